use super::{Conv, Residual, RowScale, StepLinear, step_linear, step_linear_conv, step_linear_residual};
use crate::dtype::DType;
use crate::graph::Graph;
use crate::ops::testing::{Case, Value};

/// Bounds of results in f32, and of results that are rounded to bf16 once or twice.
const F32_BOUND: f64 = 1e-5;
const BF16_BOUND: f64 = 4e-3;
const CONV_BOUND: f64 = 8e-3;

/// Tokens, columns and rows of the weight: fewer than a tile, exact tiles, rests.
const SHAPES: [(usize, usize, usize); 12] = [
    (1, 8, 1),
    (1, 768, 40),
    (3, 72, 33),
    (8, 1536, 80),
    (9, 40, 20),
    (12, 264, 50),
    (15, 2568, 70),
    (16, 5120, 200),
    (17, 72, 33),
    (33, 136, 2300),
    (40, 520, 80),
    (64, 768, 3080),
];

fn product(x: &Value, w: &Value) -> Value {
    let dot = |t: usize, n: usize| (0..w.cols).map(|k| x.at(t, k) * w.at(n, k)).sum::<f64>();
    Value::new(x.rows, w.rows, (0..x.rows * w.rows).map(|i| dot(i / w.rows, i % w.rows)).collect())
}

fn by_element(rows: usize, cols: usize, f: impl Fn(usize, usize) -> f64) -> Value {
    Value::new(rows, cols, (0..rows * cols).map(|i| f(i / cols, i % cols)).collect())
}

fn compare(what: &str, shape: (usize, usize, usize), expected: &Value, found: &Value, bound: f64) {
    let error = expected.error(found);
    assert!(error <= bound, "{what} of {shape:?} is off by {error:.2e} > {bound:.0e}");
}

#[test]
fn products_with_bias_and_scale() {
    for shape @ (t, k, n) in SHAPES {
        let (x, w) = (Value::random(t, k, 1).to_bf16(), Value::random(n, k, 2).to_bf16());
        let (bias, squares) = (Value::random(1, n, 3), Value::uniform(t, 37, 0.5, 2.0, 4));
        let v = product(&x, &w);
        let scale = |row: usize| 1.0 / ((0..37).map(|p| squares.at(row, p)).sum::<f64>() / 50.0 + 1e-5).sqrt();
        let scaled = by_element(t, n, |r, c| v.at(r, c) * scale(r) + bias.at(0, c));

        let mut case = Case::new();
        let operands = [case.input("x", &x), case.input("w", &w)];
        let (b, s) = (case.input("bias", &bias), case.input("squares", &squares));
        let plain = StepLinear::new(operands[0], operands[1], None);
        let narrow = step_linear(&mut case.graph, plain).unwrap();
        let scale = Some(RowScale { squares: s, width: 50, eps: 1e-5 });
        let wide = StepLinear { bias: Some(b), scale, dtype: DType::F32, ..plain };
        let wide = step_linear(&mut case.graph, wide).unwrap();
        case.output("narrow", narrow);
        case.output("wide", wide);
        case.run_on_gpu(|out| {
            compare("the product", shape, &v, &out["narrow"], BF16_BOUND);
            compare("the scaled product", shape, &scaled, &out["wide"], F32_BOUND);
        });
    }
}

#[test]
fn weights_in_blocks() {
    for shape @ (t, k, n) in
        [(1, 256, 1), (1, 768, 40), (9, 256, 50), (16, 5120, 200), (17, 256, 2200), (40, 768, 80), (64, 768, 3080)]
    {
        let (x, w) = (Value::random(t, k, 1).to_bf16(), Value::random(n, k, 2).to_q8_0());
        let mut case = Case::new();
        let plain = StepLinear::new(case.input("x", &x), case.input("w", &w), None);
        let y = step_linear(&mut case.graph, StepLinear { dtype: DType::F32, ..plain }).unwrap();
        case.output("y", y);
        case.run_on_gpu(|out| compare("the product", shape, &product(&x, &w), &out["y"], F32_BOUND));
    }
}

#[test]
fn a_step_of_the_convolution() {
    for shape @ (t, k, n) in SHAPES {
        let slots = t + 2;
        let width = if n == 33 { 3 } else { 4 };
        let (first, channels) = (n / 4, n - n / 4 - n / 5);
        let (x, w) = (Value::random(t, k, 1).to_bf16(), Value::random(n, k, 2).to_bf16());
        let (taps, bias) = (Value::random(channels, width, 3), Value::random(1, channels, 4));
        let state = Value::random(slots, (width - 1) * channels, 5);
        let continued: Vec<i32> = (0..t as i32).map(|i| t as i32 + 1 - i).collect();
        // What is convolved is rounded first, as a prompt's activations are.
        let v = product(&x, &w).to_bf16();
        let window = |row: usize, c: usize, i: usize| match i + 1 == width {
            true => v.at(row, first + c),
            false => state.at(continued[row] as usize, i * channels + c),
        };
        let expected = by_element(t, n, |r, c| {
            if c < first || c >= first + channels {
                return v.at(r, c);
            }
            let c = c - first;
            let sum = bias.at(0, c) + (0..width).map(|i| taps.at(c, i) * window(r, c, i)).sum::<f64>();
            sum / (1.0 + (-sum).exp())
        });
        let mut moved = state.clone();
        for (r, &slot) in continued.iter().enumerate() {
            for c in 0..channels {
                for i in 1..width {
                    moved.data[slot as usize * state.cols + (i - 1) * channels + c] = window(r, c, i);
                }
            }
        }
        let mut case = Case::new();
        let plain = StepLinear::new(case.input("x", &x), case.input("w", &w), None);
        let plain = StepLinear { slots: Some(case.input("slots", &Value::ints(&continued))), ..plain };
        let conv = Conv {
            first,
            weight: case.input("taps", &taps),
            bias: Some(case.input("bias", &bias)),
            state: case.input("state", &state),
        };
        let y = step_linear_conv(&mut case.graph, plain, conv).unwrap();
        case.output("y", y);
        case.watch("state", conv.state);
        case.run_on_gpu(|out| {
            compare("the convolution", shape, &expected, &out["y"], CONV_BOUND);
            compare("the windows", shape, &moved, &out["state"], CONV_BOUND);
        });
    }
}

#[test]
fn a_residual_and_the_first_half_of_a_norm() {
    for shape @ (t, k, n) in SHAPES {
        let (x, w) = (Value::random(t, k, 1).to_bf16(), Value::random(n, k, 2).to_bf16());
        let (r, weight) = (Value::random(t, n, 3), Value::random(1, n, 4));
        let v = product(&x, &w);
        let stream = by_element(t, n, |row, c| v.at(row, c) + r.at(row, c));
        let weighted = by_element(t, n, |r, c| stream.at(r, c) * weight.at(0, c));
        let squares = by_element(t, 1, |r, _| (0..n).map(|c| stream.at(r, c).powi(2)).sum());

        let mut case = Case::new();
        let plain = StepLinear::new(case.input("x", &x), case.input("w", &w), None);
        let residual = Residual { residual: case.input("r", &r), norm_weight: case.input("weight", &weight) };
        let out = step_linear_residual(&mut case.graph, plain, residual).unwrap();
        for (name, t) in [("stream", out.stream), ("weighted", out.weighted), ("squares", out.squares)] {
            case.output(name, t);
        }
        case.run_on_gpu(|out| {
            compare("the stream", shape, &stream, &out["stream"], F32_BOUND);
            compare("the weighted stream", shape, &weighted, &out["weighted"], BF16_BOUND);
            let parts = &out["squares"];
            let sums = by_element(t, 1, |r, _| (0..parts.cols).map(|p| parts.at(r, p)).sum());
            compare("the sum of squares", shape, &squares, &sums, F32_BOUND);
        });

        // As behind the last layer, where nobody reads the stream itself.
        let mut case = Case::new();
        let plain = StepLinear::new(case.input("x", &x), case.input("w", &w), None);
        let residual = Residual { residual: case.input("r", &r), norm_weight: case.input("weight", &weight) };
        let out = step_linear_residual(&mut case.graph, plain, residual).unwrap();
        case.output("weighted", out.weighted);
        case.run_on_gpu(|out| compare("the weighted stream alone", shape, &weighted, &out["weighted"], BF16_BOUND));

        // As there, where a norm of its own follows.
        let mut case = Case::new();
        let plain = StepLinear::new(case.input("x", &x), case.input("w", &w), None);
        let residual = Residual { residual: case.input("r", &r), norm_weight: case.input("weight", &weight) };
        let out = step_linear_residual(&mut case.graph, plain, residual).unwrap();
        case.output("stream", out.stream);
        case.run_on_gpu(|out| compare("the stream alone", shape, &stream, &out["stream"], F32_BOUND));
    }
}

#[test]
fn wrong_operands_are_named_errors() {
    let mut g = Graph::new();
    let x = g.new_tensor(DType::BF16, 2, 12);
    let w = g.new_tensor(DType::BF16, 5, 12);
    let error = step_linear(&mut g, StepLinear::new(x, w, None)).unwrap_err().to_string();
    assert!(error.contains("multiple of 8 columns, but has 12"), "{error}");
    let wide = g.new_tensor(DType::BF16, 5, 16);
    let error = step_linear(&mut g, StepLinear::new(x, wide, None)).unwrap_err().to_string();
    assert_eq!(error, "step_linear: x must be [any, 16], but is [2, 12]");
}
