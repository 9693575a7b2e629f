//! Sums over the devices of a group, in place: how data-parallel training adds up gradients.
//!
//! ```text
//! x ← Σ_rank x_rank          for each of some externals x, f32
//! ```
//!
//! Every member of the group runs the same sums in the same order. On GPUs an op is one call of NCCL for all its
//! operands on the group's own stream: it begins when the operands are ready, and what is recorded after it runs
//! meanwhile; the plan ends when all sums are done. Nothing in the plan may read a sum therefore: it is for the plans
//! that follow. All members get the same bits.
//!
//! On a CPU a member waits for the others, and sums are taken in the order of the ranks. If one of them has left, the
//! result is NaN, so that nobody takes it for a sum.

use std::sync::Arc;

use crate::cpu::Cpu;
use crate::cuda::Launcher;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};
use crate::group::Member;

/// Sums each external of `parts` over the group. A part is the value to sum, as [`Graph::store`] returned it, and the
/// external that it was stored in.
///
/// # Errors
/// A part that is not f32, or no external.
pub fn all_reduce(g: &mut Graph, member: &Arc<Member>, parts: &[(TensorId, TensorId)]) -> Result<(), Error> {
    let mut outputs = Vec::with_capacity(parts.len());
    for &(value, external) in parts {
        g.expect_f32("all_reduce", "a part", value, None, None)?;
        g.expect_f32("all_reduce", "an external", external, Some(g.rows(value)), Some(g.cols(value)))?;
        outputs.push(Some(g.in_place(external)?));
    }
    g.push(AllReduce(member.clone()), parts.iter().map(|p| Some(p.0)).collect(), outputs);
    Ok(())
}

#[derive(Debug)]
struct AllReduce(Arc<Member>);

impl Op for AllReduce {
    fn name(&self) -> &'static str {
        "all_reduce"
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        let numbers: usize = node.outputs.iter().flatten().map(|&t| g.rows(t) * g.cols(t)).sum();
        ((self.0.count() - 1) * numbers) as f64
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        let Some(communicator) = self.0.on_gpu() else {
            return Err(Error::Unsupported { op: "all_reduce", message: "the group is one of CPUs".into() });
        };
        // Neighbours in memory, as gradients of a layer are, become one sum.
        let mut ranges: Vec<(u64, usize)> =
            io.outputs.iter().flatten().map(|m| (m.address(), m.rows * m.cols)).collect();
        ranges.sort_unstable();
        ranges.dedup_by(|next, range| {
            let touch = range.0 + 4 * range.1 as u64 == next.0;
            range.1 += if touch { next.1 } else { 0 };
            touch
        });
        launcher.all_reduce(communicator, &ranges)
    }

    fn run_cpu(&self, io: &Io<'_>, _: &Cpu) {
        let mut own = Vec::new();
        for m in io.outputs.iter().flatten() {
            // SAFETY: externals are contiguous and f32, and were stored before; nobody writes them now.
            (0..m.rows).for_each(|r| own.extend_from_slice(unsafe { m.row::<f32>(r) }));
        }
        let all = self.0.on_host().and_then(|meeting| meeting.exchange(self.0.rank(), own));
        let mut at = 0;
        for m in io.outputs.iter().flatten() {
            for r in 0..m.rows {
                // SAFETY: as above; this op alone writes its outputs.
                for x in unsafe { m.row_mut::<f32>(r) } {
                    *x = all.as_ref().map_or(f32::NAN, |all| all.iter().map(|numbers| numbers[at]).sum());
                    at += 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::elementwise;
    use crate::{DType, Device};

    /// Runs `2x` for x = rank + 1, summed over these devices; `leaves` does not come. Every plan runs twice: a GPU
    /// captures the first run and replays it.
    fn run(devices: &[Device], leaves: Option<usize>) -> Vec<Vec<f32>> {
        let members: Vec<Arc<Member>> = Member::group(devices).unwrap().into_iter().map(Arc::new).collect();
        let one = |member: &Arc<Member>, device: &Device| {
            if leaves == Some(member.rank()) {
                member.leave();
                return Vec::new();
            }
            let mut g = Graph::new();
            let x = g.external("x", DType::F32, 2, 3);
            let y = elementwise::scale(&mut g, x, 2.0).unwrap();
            let dest = g.external("y", DType::F32, 2, 3);
            let stored = g.store(y, dest).unwrap();
            let last = g.external("last", DType::F32, 1, 1);
            let one = elementwise::fill(&mut g, DType::F32, 1, 1, 1.0).unwrap();
            let one = g.store(one, last).unwrap();
            all_reduce(&mut g, member, &[(stored, dest), (one, last)]).unwrap();
            let plan = device.plan(g).unwrap();
            let (arena, memory) = (device.arena(&plan).unwrap(), device.alloc(128).unwrap());
            memory.write(0, &[member.rank() as f32 + 1.0; 6]);
            for _ in 0..2 {
                device.run(&plan, &arena, &[memory.at(0), memory.at(64), memory.at(88)]).unwrap();
            }
            memory.to_vec::<f32>(64, 7)
        };
        let one = &one;
        std::thread::scope(|scope| {
            let threads: Vec<_> = members.iter().zip(devices).map(|(m, d)| scope.spawn(move || one(m, d))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    fn cpus(count: usize) -> Vec<Device> {
        vec![Device::cpu(Some(1)).unwrap(); count]
    }

    #[test]
    fn all_get_the_sum() {
        assert_eq!(run(&cpus(1), None), [[2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0]]);
        let expected = [12.0, 12.0, 12.0, 12.0, 12.0, 12.0, 3.0];
        assert_eq!(run(&cpus(3), None), [expected; 3]);
    }

    #[test]
    fn all_gpus_get_the_sum() {
        // The emulation has no NCCL.
        if std::env::var("HOGNOSE_TEST_CUDA").is_ok_and(|v| v != "emulate") {
            for count in 1..=crate::cuda::Cuda::count() {
                let gpus: Vec<_> = (0..count).map(|n| Device::cuda(n).unwrap()).collect();
                let sum = (count * (count + 1)) as f32;
                let expected = [sum, sum, sum, sum, sum, sum, count as f32];
                assert_eq!(run(&gpus, None), vec![expected; count]);
            }
        }
    }

    #[test]
    fn nobody_hangs_when_one_leaves() {
        let out = run(&cpus(2), Some(1));
        assert!(out[0].iter().all(|v| v.is_nan()), "{out:?}");
    }
}
