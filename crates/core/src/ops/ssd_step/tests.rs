use super::{Gate, SsdStep, ssd_step};
use crate::dtype::DType;
use crate::ops::ssd::reference::{Inputs, Shape, ssd};
use crate::ops::testing::{Case, Value};

/// Bounds of y and of the states, with activations in f32 and in bf16.
const BOUNDS: [(DType, f64, f64); 2] = [(DType::F32, 4e-5, 4e-5), (DType::BF16, 4e-3, 4e-5)];

/// Tokens, heads, channels of a head, states, groups.
const SHAPES: [(usize, usize, usize, usize, usize); 6] =
    [(1, 1, 1, 1, 1), (1, 4, 64, 128, 1), (3, 6, 20, 16, 2), (5, 2, 16, 30, 1), (65, 2, 33, 64, 2), (2, 2, 8, 256, 1)];

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

#[test]
fn agrees_with_the_recurrence() {
    for (t, h, p, n, groups) in SHAPES {
        for (dtype, y_bound, state_bound) in BOUNDS {
            for mode in 0..4 {
                let value = |cols, seed| match dtype {
                    DType::BF16 => Value::random(t, cols, seed).to_bf16(),
                    _ => Value::random(t, cols, seed),
                };
                let d = h * p;
                let (x, z, dt) = (value(d, 1), value(d, 2), value(h, 3));
                let (b, c) = (value(groups * n, 4), value(groups * n, 5));
                let (a, bias) = (Value::uniform(1, h, -4.0, -0.1, 6), Value::random(1, h, 7));
                let skip = Value::random(1, if mode % 2 == 0 { h } else { d }, 8);
                let (weight, state) = (Value::random(1, d, 9), Value::random(t + 1, d * n, 10));
                let slots: Vec<i32> = (0..t as i32).map(|i| t as i32 - i).collect();
                let dt_limit = (0.05, 1.5);

                let initial: Vec<f64> =
                    slots.iter().flat_map(|&s| state.data[s as usize * d * n..][..d * n].to_vec()).collect();
                let segments: Vec<usize> = (0..=t).collect();
                let shape = Shape {
                    heads: h,
                    headdim: p,
                    d_state: n,
                    groups,
                    softplus: true,
                    dt_limit: (f64::from(dt_limit.0), f64::from(dt_limit.1)),
                };
                let (v, last) = ssd(
                    &shape,
                    &Inputs {
                        x: &x.data,
                        dt: &dt.data,
                        a: &a.data,
                        b: &b.data,
                        c: &c.data,
                        d: Some(&skip.data),
                        z: None,
                        dt_bias: Some(&bias.data),
                        initial_state: Some(&initial),
                        segments: &segments,
                    },
                );
                let mut states = state.clone();
                for (i, &s) in slots.iter().enumerate() {
                    states.data[s as usize * d * n..][..d * n].copy_from_slice(&last[i * d * n..][..d * n]);
                }
                let gated = |i: usize| if mode == 0 { v[i] } else { v[i] * silu(z.data[i]) };
                let weighted = |i: usize| if mode < 2 { 1.0 } else { weight.data[i % d] };
                let y = Value::new(t, d, (0..t * d).map(|i| gated(i) * weighted(i)).collect());
                let square = |i: usize| if mode == 2 { gated(i).powi(2) } else { v[i].powi(2) };
                let squares = Value::new(t, 1, (0..t).map(|r| (0..d).map(|c| square(r * d + c)).sum()).collect());

                let mut case = Case::new();
                let (zt, wt) = (case.input("z", &z), case.input("weight", &weight));
                let step = SsdStep {
                    x: case.input("x", &x),
                    dt: case.input("dt", &dt),
                    a: case.input("a", &a),
                    b: case.input("b", &b),
                    c: case.input("c", &c),
                    d: Some(case.input("d", &skip)),
                    dt_bias: Some(case.input("bias", &bias)),
                    dt_limit,
                    headdim: p,
                    d_state: n,
                    gate: [Gate::None, Gate::Silu(zt), Gate::SiluThenNorm(zt, wt), Gate::NormThenSilu(zt, wt)][mode],
                    state: case.input("state", &state),
                    slots: Some(case.input("slots", &Value::ints(&slots))),
                };
                let (out, parts) = ssd_step(&mut case.graph, step).unwrap();
                case.output("y", out);
                if let Some(parts) = parts {
                    case.output("squares", parts);
                }
                case.watch("state", step.state);
                case.run_on_gpu(|out| {
                    let what = format!("{t} tokens, {h} heads of {p}, {n} states, {groups} groups, {dtype}, {mode}");
                    let errors = [y.error(&out["y"]), states.error(&out["state"])];
                    assert!(errors[0] <= y_bound && errors[1] <= state_bound, "{what}: off by {errors:.7?}");
                    if let Some(parts) = out.get("squares") {
                        let sums = (0..t).map(|r| (0..parts.cols).map(|p| parts.at(r, p)).sum()).collect();
                        let error = squares.error(&Value::new(t, 1, sums));
                        assert!(error <= state_bound, "{what}: squares off by {error:.1e}");
                    }
                });
            }
        }
    }
}
