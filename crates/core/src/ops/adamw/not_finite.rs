//! Where gradients went astray: the first number that is infinite or NaN.
//!
//! A device goes on with the next step before anybody has read the norm of this one, and overwrites the gradients. So it
//! looks for the culprit itself, if the norm says that there is one.

use super::cuda;
use crate::cpu::Cpu;
use crate::cuda::Launcher;
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};

/// The place of the first element of `x` [1, n] that is not finite: an i32 tensor [1, 2] with the lower and the upper
/// half of a 64-bit number, all ones where there is none or where `norm`, that of x, is finite.
///
/// # Errors
/// x is not one row of f32, or the norm not one f32.
pub fn first_not_finite(g: &mut Graph, x: TensorId, norm: TensorId) -> Result<TensorId, Error> {
    g.expect_f32("first_not_finite", "x", x, Some(1), None)?;
    g.expect_f32("first_not_finite", "the norm", norm, Some(1), Some(1))?;
    let place = g.new_tensor(DType::I32, 1, 2);
    g.push(FirstNotFinite, vec![Some(x), Some(norm)], vec![Some(place)]);
    Ok(place)
}

#[derive(Debug)]
struct FirstNotFinite;

impl Op for FirstNotFinite {
    fn name(&self) -> &'static str {
        "first_not_finite"
    }

    fn flops(&self, _: &Graph, _: &Node) -> f64 {
        0.0
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::first_not_finite(io, launcher)
    }

    fn run_cpu(&self, io: &Io<'_>, _: &Cpu) {
        // SAFETY: the builder checked the types; inputs do not change, and this op alone writes its output.
        let (x, norm, place) =
            unsafe { (io.input(0).row::<f32>(0), io.input(1).row::<f32>(0)[0], io.output(0).row_mut::<i32>(0)) };
        let found = if norm.is_finite() { None } else { x.iter().position(|v| !v.is_finite()) };
        let found = found.map_or(u64::MAX, |i| i as u64);
        (place[0], place[1]) = (found as i32, (found >> 32) as i32);
    }
}
