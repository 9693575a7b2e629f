use super::{gated_rms_norm, reference};
use crate::TensorId;
use crate::graph::{Graph, Recompute};
use crate::ops::layout::{concat, split};
use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16, oracle};

/// Bounds on max|difference| / max|expected| against f64.
const BOUND: f64 = 1e-5;
const GRADIENT_BOUND: f64 = 1e-4;

fn expected(v: &[Value], group: usize, eps: f64, norm_first: bool) -> Vec<Value> {
    let (rows, cols) = (v[0].rows, v[0].cols);
    let row = |r: usize| r * cols..(r + 1) * cols;
    let weight = v.get(2).map(|w| w.data.as_slice());
    let data = (0..rows)
        .flat_map(|r| reference(&v[0].data[row(r)], &v[1].data[row(r)], weight, group, eps, norm_first))
        .collect();
    vec![Value::new(rows, cols, data)]
}

#[test]
fn values_and_gradients() {
    for norm_first in [false, true] {
        for (rows, cols, group) in [(5, 32, 32), (3, 42, 7), (70, 12, 6), (2, 9, 1), (1, 37, 37)] {
            let all = [
                ("x", Value::random(rows, cols, 1)),
                ("z", Value::random(rows, cols, 2)),
                ("weight", Value::random(1, cols, 3)),
            ];
            for with_weight in [true, false] {
                let inputs = if with_weight { &all[..] } else { &all[..2] };
                let names: Vec<&str> = inputs.iter().map(|(n, _)| *n).collect();
                let build = |g: &mut Graph, t: &[TensorId]| {
                    vec![gated_rms_norm(g, t[0], t[1], t.get(2).copied(), group, 0.1, norm_first).unwrap()]
                };
                let reference = |v: &[Value]| expected(v, group, f64::from(0.1f32), norm_first);
                check_op(inputs, &names, build, reference, (BOUND, GRADIENT_BOUND));
                check_op_bf16(inputs, &["x", "z"], &names, build, reference, BF16_BOUNDS);
            }
        }
    }
}

/// Groups that a GPU spreads over a block of 128 threads and over one of 512.
#[test]
fn wide_groups() {
    for (rows, cols, group) in [(2, 2400, 1200), (1, 4100, 4100)] {
        let inputs = [
            ("x", Value::random(rows, cols, 1)),
            ("z", Value::random(rows, cols, 2)),
            ("w", Value::random(1, cols, 3)),
        ];
        let build =
            |g: &mut Graph, t: &[TensorId]| vec![gated_rms_norm(g, t[0], t[1], Some(t[2]), group, 0.1, false).unwrap()];
        let reference = |v: &[Value]| expected(v, group, f64::from(0.1f32), false);
        check_op(&inputs, &["z", "w"], build, reference, (BOUND, GRADIENT_BOUND));
        check_op_bf16(&inputs, &["x", "z"], &["x"], build, reference, BF16_BOUNDS);
    }
}

#[test]
fn agrees_with_the_oracles() {
    let cases =
        [("gated_rmsnorm", 32, false), ("gated_rmsnorm_groups", 16, false), ("gated_rmsnorm_norm_first", 32, true)];
    for (name, group, norm_first) in cases {
        let file = oracle(name);
        let value = |key: &str| {
            let t = &file[key];
            if t.shape.len() == 2 { t.permute(&[0, 1], 1) } else { t.permute(&[0], 1) }
        };
        let mut case = Case::new();
        let ids = ["x", "z", "weight"].map(|key| case.input(key, &value(key)));
        let y = gated_rms_norm(&mut case.graph, ids[0], ids[1], Some(ids[2]), group, 1e-5, norm_first).unwrap();
        let dy = case.input("dy", &value("dy"));
        let gradients = case.graph.backward(&[(y, dy)], &ids, Recompute::Nothing).unwrap();
        for (key, gradient) in ["grad.x", "grad.z", "grad.weight"].iter().zip(gradients) {
            case.output(key, gradient.unwrap());
        }
        case.output("y", y);
        case.run_everywhere(|isa, out| {
            let bounds =
                [("y", BOUND), ("grad.x", GRADIENT_BOUND), ("grad.z", GRADIENT_BOUND), ("grad.weight", GRADIENT_BOUND)];
            for (key, bound) in bounds {
                let error = value(key).error(&out[key]);
                assert!(error <= bound, "{isa}: {name}: {key} is off by {error:.2e}");
            }
        });
    }
}

#[test]
fn operands_may_be_columns_of_wider_tensors() {
    let both = Value::random(50, 48, 5);
    let columns = |from: usize| (0..50).flat_map(|r| both.data[r * 48 + from..r * 48 + from + 20].to_vec()).collect();
    let (x, z): (Vec<f64>, Vec<f64>) = (columns(3), columns(25));
    let mut case = Case::new();
    let input = case.input("both", &both);
    let parts = split(&mut case.graph, input, &[3, 20, 2, 20, 3]).unwrap();
    let y = gated_rms_norm(&mut case.graph, parts[1], parts[3], None, 10, 1e-5, false).unwrap();
    let whole = concat(&mut case.graph, &[parts[0], y]).unwrap();
    case.output("whole", whole);
    let expected = expected(&[Value::new(50, 20, x), Value::new(50, 20, z)], 10, 1e-5, false);
    case.run_everywhere(|isa, out| {
        let got = (0..50).flat_map(|r| out["whole"].data[r * 23 + 3..(r + 1) * 23].to_vec()).collect();
        let error = expected[0].error(&Value::new(50, 20, got));
        assert!(error <= BOUND, "{isa}: {error:.2e}");
    });
}

#[test]
fn mismatched_operands_are_named_errors() {
    let mut case = Case::new();
    let x = case.input("x", &Value::random(2, 6, 1));
    let z = case.input("z", &Value::random(2, 5, 1));
    let g = &mut case.graph;
    let message = gated_rms_norm(g, x, x, None, 4, 1e-5, false).unwrap_err().to_string();
    assert_eq!(message, "gated_rms_norm: the group size must be a divisor of the width 6, but is 4");
    let message = gated_rms_norm(g, x, z, None, 6, 1e-5, false).unwrap_err().to_string();
    assert_eq!(message, "gated_rms_norm: z must be [2, 6], but is [2, 5]");
}
