use super::{layer_norm, reference, rms_norm, rms_norm_to};
use crate::DType;
use crate::graph::{Graph, Recompute, TensorId};
use crate::ops::layout;
use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16, places};

/// Bound of y and s against f64.
const BOUND: f64 = 1e-6;
/// Bound of the gradients against finite differences in f64.
const GRADIENT_BOUND: f64 = 1e-5;
const EPS: f32 = 1e-5;
/// Narrower than a vector, as wide as one, with a rest; rows of one block and of several.
const SHAPES: [(usize, usize); 6] = [(1, 1), (3, 4), (2, 16), (5, 48), (70, 9), (2, 149)];

fn value(like: &Value, data: Vec<f64>) -> Value {
    Value::new(like.rows, like.cols, data)
}

#[test]
fn rms_norm_agrees_with_the_reference_and_finite_differences() {
    for (rows, cols) in SHAPES {
        let (x, residual) = (Value::random(rows, cols, 1), Value::random(rows, cols, 2));
        let weight = Value::uniform(1, cols, 0.5, 1.5, 3);
        let eps = f64::from(EPS);
        // y = ±1 for a single column: what remains of its gradient is rounding.
        let first = if cols == 1 { 3 } else { 0 };
        let all = [("x", x.clone()), ("residual", residual.clone()), ("weight", weight.clone())];
        check_op(
            &all,
            &["x", "residual", "weight"][first..],
            |g, t| {
                let out = rms_norm(g, t[0], Some(t[1]), Some(t[2]), EPS).unwrap();
                vec![out.y, out.residual]
            },
            |v| {
                let (y, s) = reference::rms_norm(&v[0].data, cols, Some(&v[1].data), Some(&v[2].data), eps);
                vec![value(&v[0], y), value(&v[0], s)]
            },
            (BOUND, GRADIENT_BOUND),
        );
        // The sum is computed, but nobody reads it: the last norm of a model.
        check_op(
            &all,
            &["x", "residual", "weight"][first..],
            |g, t| vec![rms_norm(g, t[0], Some(t[1]), Some(t[2]), EPS).unwrap().y],
            |v| {
                let (y, _) = reference::rms_norm(&v[0].data, cols, Some(&v[1].data), Some(&v[2].data), eps);
                vec![value(&v[0], y)]
            },
            (BOUND, GRADIENT_BOUND),
        );
        // Falcon-Mamba's norm of B, C and Δ has neither residual nor weight.
        check_op(
            &[("x", x)],
            &["x"][first.min(1)..],
            |g, t| vec![rms_norm(g, t[0], None, None, EPS).unwrap().y],
            |v| vec![value(&v[0], reference::rms_norm(&v[0].data, cols, None, None, eps).0)],
            (BOUND, GRADIENT_BOUND),
        );
    }
}

#[test]
fn layer_norm_agrees_with_the_reference_and_finite_differences() {
    // One column alone has no variance: y = bias, and rounding is all that remains of the gradient.
    for (rows, cols) in SHAPES.into_iter().filter(|s| s.1 > 1) {
        // Far from zero, where centring matters.
        let mut x = Value::random(rows, cols, 1);
        x.data.iter_mut().for_each(|v| *v += 1.0);
        let inputs = [
            ("x", x),
            ("residual", Value::random(rows, cols, 2)),
            ("weight", Value::uniform(1, cols, 0.5, 1.5, 3)),
            ("bias", Value::random(1, cols, 4)),
        ];
        check_op(
            &inputs,
            &["x", "residual", "weight", "bias"],
            |g, t| {
                let out = layer_norm(g, t[0], Some(t[1]), t[2], t[3], EPS).unwrap();
                vec![out.y, out.residual]
            },
            |v| {
                let [x, residual, weight, bias] = [0, 1, 2, 3].map(|i| &v[i].data[..]);
                let (y, s) = reference::layer_norm(x, Some(residual), weight, bias, f64::from(EPS));
                vec![value(&v[0], y), value(&v[0], s)]
            },
            (BOUND, GRADIENT_BOUND),
        );
    }
}

/// Rows that a GPU spreads over a block of 128 threads and over one of 512.
#[test]
fn wide_rows() {
    for (rows, cols) in [(3, 1300), (1, 4201)] {
        let inputs = [
            ("x", Value::random(rows, cols, 1)),
            ("residual", Value::random(rows, cols, 2)),
            ("weight", Value::uniform(1, cols, 0.5, 1.5, 3)),
            ("bias", Value::random(1, cols, 4)),
        ];
        check_op(
            &inputs,
            &["x", "weight", "bias"],
            |g, t| vec![layer_norm(g, t[0], Some(t[1]), t[2], t[3], EPS).unwrap().y],
            |v| {
                let [x, residual, weight, bias] = [0, 1, 2, 3].map(|i| &v[i].data[..]);
                vec![value(&v[0], reference::layer_norm(x, Some(residual), weight, bias, f64::from(EPS)).0)]
            },
            (BOUND, GRADIENT_BOUND),
        );
    }
}

#[test]
fn norms_of_bf16() {
    let eps = f64::from(EPS);
    for (rows, cols) in [(3, 4), (70, 9), (5, 48), (2, 149), (2, 1300)] {
        let inputs = [
            ("x", Value::random(rows, cols, 1)),
            ("residual", Value::random(rows, cols, 2)),
            ("weight", Value::uniform(1, cols, 0.5, 1.5, 3)),
            ("bias", Value::random(1, cols, 4)),
        ];
        // y in bf16, the sum in f32.
        check_op_bf16(
            &inputs[..3],
            &["x"],
            &["x", "residual", "weight"],
            |g, t| {
                let out = rms_norm(g, t[0], Some(t[1]), Some(t[2]), EPS).unwrap();
                vec![out.y, out.residual]
            },
            |v| {
                let (y, s) = reference::rms_norm(&v[0].data, cols, Some(&v[1].data), Some(&v[2].data), eps);
                vec![value(&v[0], y), value(&v[0], s)]
            },
            BF16_BOUNDS,
        );
        check_op_bf16(
            &inputs,
            &["x"],
            &["x", "residual", "weight", "bias"],
            |g, t| vec![layer_norm(g, t[0], Some(t[1]), t[2], t[3], EPS).unwrap().y],
            |v| {
                let [x, residual, weight, bias] = [0, 1, 2, 3].map(|i| &v[i].data[..]);
                vec![value(&v[0], reference::layer_norm(x, Some(residual), weight, bias, eps).0)]
            },
            BF16_BOUNDS,
        );
        // The first norm of a model reads f32, that of B, C and Δ reads bf16 and has no residual.
        let plain = |v: &[Value]| vec![value(&v[0], reference::rms_norm(&v[0].data, cols, None, None, eps).0)];
        let to_bf16 =
            |g: &mut Graph, t: &[TensorId]| vec![rms_norm_to(g, t[0], None, None, EPS, DType::BF16).unwrap().y];
        check_op_bf16(&inputs[..1], &[], &["x"], to_bf16, plain, BF16_BOUNDS);
        let bf16 = |g: &mut Graph, t: &[TensorId]| vec![rms_norm(g, t[0], None, None, EPS).unwrap().y];
        check_op_bf16(&inputs[..1], &["x"], &["x"], bf16, plain, BF16_BOUNDS);
    }
}

#[test]
fn columns_of_a_wider_tensor_can_be_normed_apart() {
    let eps = f64::from(EPS);
    check_op(
        &[("x", Value::random(40, 4 + 16 + 5, 1))],
        &["x"],
        |g, t| {
            let parts = layout::split(g, t[0], &[4, 16, 5]).unwrap();
            parts.iter().map(|&p| rms_norm(g, p, None, None, EPS).unwrap().y).collect()
        },
        |v| {
            let part = |from: usize, cols: usize| {
                let rows = (0..v[0].rows).flat_map(|r| (from..from + cols).map(move |c| (r, c)));
                let x: Vec<f64> = rows.map(|(r, c)| v[0].at(r, c)).collect();
                Value::new(v[0].rows, cols, reference::rms_norm(&x, cols, None, None, eps).0)
            };
            vec![part(0, 4), part(4, 16), part(20, 5)]
        },
        (BOUND, GRADIENT_BOUND),
    );
}

#[test]
fn the_gradient_of_the_sum_alone_passes_through() {
    let (x, residual, d) = (Value::random(3, 5, 1), Value::random(3, 5, 2), Value::random(3, 5, 3));
    let mut case = Case::new();
    let (x, residual, seed) = (case.input("x", &x), case.input("residual", &residual), case.input("d", &d));
    let out = rms_norm(&mut case.graph, x, Some(residual), None, EPS).unwrap();
    let grads = case.graph.backward(&[(out.residual, seed)], &[x, residual], Recompute::Nothing).unwrap();
    assert_eq!(grads, [Some(seed), Some(seed)]);
}

#[test]
fn a_row_has_the_same_bits_in_any_pack() {
    let x = Value::random(33, 100, 1);
    let run = |rows: std::ops::Range<usize>, place: &str| {
        let mut case = Case::new();
        let part = Value::new(rows.len(), 100, x.data[rows.start * 100..rows.end * 100].to_vec());
        let t = case.input("x", &part);
        let y = rms_norm(&mut case.graph, t, None, None, EPS).unwrap().y;
        case.output("y", y);
        case.run_on(place, 2)["y"].clone()
    };
    for place in places() {
        let whole = run(0..33, &place);
        for cut in [1, 7, 32] {
            let parts = [run(0..cut, &place).data, run(cut..33, &place).data].concat();
            assert_eq!(parts, whole.data, "{place}");
        }
    }
}

#[test]
fn without_a_residual_x_is_the_new_one() {
    let mut case = Case::new();
    let x = case.input("x", &Value::random(2, 3, 1));
    assert_eq!(rms_norm(&mut case.graph, x, None, None, EPS).unwrap().residual, x);
}

#[test]
fn wrong_operands_are_named_errors() {
    let mut g = Graph::new();
    let x = g.new_tensor(crate::DType::F32, 2, 3);
    let narrow = g.new_tensor(crate::DType::F32, 1, 2);
    let empty = g.new_tensor(crate::DType::F32, 2, 0);
    let message = |r: Result<super::Normed, crate::Error>| r.unwrap_err().to_string();
    assert_eq!(
        message(rms_norm(&mut g, x, None, Some(narrow), EPS)),
        "rms_norm: the weight must be [1, 3], but is [1, 2]"
    );
    assert_eq!(
        message(layer_norm(&mut g, x, Some(narrow), x, x, EPS)),
        "layer_norm: the residual must be [2, 3], but is [1, 2]"
    );
    assert_eq!(
        message(rms_norm(&mut g, empty, None, None, EPS)),
        "rms_norm: x must be at least one column wide, but is [2, 0]"
    );
    assert_eq!(
        message(rms_norm(&mut g, x, None, None, f32::NAN)),
        "rms_norm: eps must be a finite number of at least 0, but is NaN"
    );
}
