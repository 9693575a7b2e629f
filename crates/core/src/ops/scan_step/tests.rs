use super::{MOST, ScanStep, scan_step};
use crate::dtype::DType;
use crate::graph::Graph;
use crate::ops::selective_scan::Discretisation;
use crate::ops::selective_scan::reference::{Operands, selective_scan};
use crate::ops::testing::{Case, Value};

/// Bounds of y and of the states, with activations in f32 and in bf16.
const BOUNDS: [(DType, f64, f64); 2] = [(DType::F32, 4e-5, 4e-5), (DType::BF16, 4e-3, 4e-5)];

/// Tokens, channels, states, rank.
const SHAPES: [(usize, usize, usize, usize); 6] =
    [(1, 5, 1, 1), (1, 96, 16, 48), (7, 40, 16, 6), (12, 33, 7, 12), (66, 64, 16, 160), (2, 32, 256, 256)];

fn rounded(value: Value, dtype: DType) -> Value {
    if dtype == DType::BF16 { value.to_bf16() } else { value }
}

#[test]
fn agrees_with_the_scan() {
    for (t, d, n, r) in SHAPES {
        for (dtype, y_bound, state_bound) in BOUNDS {
            for norm_eps in [None, Some(1e-5f32)] {
                let value = |rows, cols, seed| rounded(Value::random(rows, cols, seed), dtype);
                let (x, z, dt_weight) = (value(t, d, 1), value(t, d, 2), value(d, r, 3));
                let (dt_b_c, bias, skip) =
                    (Value::random(t, r + 2 * n, 4), Value::random(1, d, 5), Value::random(1, d, 6));
                let (a, state) = (Value::uniform(d, n, -4.0, -0.1, 7), Value::random(t + 1, n * d, 8));
                let slots: Vec<i32> = (0..t as i32).map(|i| t as i32 - i).collect();

                let part = |from: usize, cols: usize| -> Vec<f64> {
                    let mut part = Vec::new();
                    for row in 0..t {
                        let values: Vec<f64> = (from..from + cols).map(|c| dt_b_c.at(row, c)).collect();
                        let mean = values.iter().map(|v| v * v).sum::<f64>() / cols as f64;
                        let scale = norm_eps.map_or(1.0, |eps| 1.0 / (mean + f64::from(eps)).sqrt());
                        part.extend(values.iter().map(|v| v * scale));
                    }
                    part
                };
                let low = part(0, r);
                let dt: Vec<f64> =
                    (0..t * d).map(|i| (0..r).map(|k| low[i / d * r + k] * dt_weight.at(i % d, k)).sum()).collect();
                let initial: Vec<f64> =
                    slots.iter().flat_map(|&s| state.data[s as usize * n * d..][..n * d].to_vec()).collect();
                let segments: Vec<_> = (0..t).map(|i| i..i + 1).collect();
                let (y, last) = selective_scan(&Operands {
                    channels: d,
                    d_state: n,
                    groups: 1,
                    x: &x.data,
                    dt: &dt,
                    a: &a.data,
                    b: &part(r, n),
                    c: &part(r + n, n),
                    d: Some(&skip.data),
                    z: Some(&z.data),
                    dt_bias: Some(&bias.data),
                    initial_state: Some(&initial),
                    segments: &segments,
                    softplus: true,
                    discretisation: Discretisation::Euler,
                });
                let mut states = state.clone();
                for (i, &s) in slots.iter().enumerate() {
                    states.data[s as usize * n * d..][..n * d].copy_from_slice(&last[i * n * d..][..n * d]);
                }

                let mut case = Case::new();
                let step = ScanStep {
                    x: case.input("x", &x),
                    z: case.input("z", &z),
                    dt_b_c: case.input("dt_b_c", &dt_b_c),
                    norm_eps,
                    dt_weight: case.input("dt_weight", &dt_weight),
                    dt_bias: Some(case.input("bias", &bias)),
                    a: case.input("a", &a),
                    d: Some(case.input("d", &skip)),
                    state: case.input("state", &state),
                    slots: Some(case.input("slots", &Value::ints(&slots))),
                };
                let out = scan_step(&mut case.graph, step).unwrap();
                case.output("y", out);
                case.watch("state", step.state);
                case.run_on_gpu(|out| {
                    let errors = [Value::new(t, d, y.clone()).error(&out["y"]), states.error(&out["state"])];
                    let what = format!("{t} tokens, {d} channels, {n} states, rank {r}, {dtype}, {norm_eps:?}");
                    assert!(errors[0] <= y_bound && errors[1] <= state_bound, "{what}: off by {errors:.7?}");
                });
            }
        }
    }
}

#[test]
fn too_many_states_are_an_error() {
    let mut g = Graph::new();
    let (d, n) = (4, MOST + 1);
    let x = g.new_tensor(DType::F32, 1, d);
    let state = g.external("state", DType::F32, 1, n * d);
    let step = ScanStep {
        x,
        z: x,
        dt_b_c: g.new_tensor(DType::F32, 1, 1 + 2 * n),
        norm_eps: None,
        dt_weight: g.new_tensor(DType::F32, d, 1),
        dt_bias: None,
        a: g.new_tensor(DType::F32, d, n),
        d: None,
        state,
        slots: None,
    };
    assert!(scan_step(&mut g, step).unwrap_err().to_string().contains("257 states"));
}
