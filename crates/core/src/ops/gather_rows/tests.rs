use super::{gather_rows, reference};
use crate::graph::{Graph, Recompute, TensorId};
use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16};

/// Rows are copied.
const BOUND: f64 = 0.0;
/// Bound of the gradient, a sum of a few rows, against finite differences in f64.
const GRADIENT_BOUND: f64 = 1e-6;
/// Bound of sums of thousands of rows.
const LONG_SUM_BOUND: f64 = 1e-5;

fn ints(v: &Value) -> Vec<i32> {
    v.data.iter().map(|&i| i as i32).collect()
}

#[test]
fn rows_that_repeat_add_up_in_the_gradient() {
    for (n, d, rows) in
        [(1, 1, vec![0]), (5, 7, vec![4, 0, 4, 4, 2]), (200, 530, vec![199, 3, 64, 65, 3]), (3, 2, vec![])]
    {
        let inputs = [("x", Value::random(n, d, 1)), ("rows", Value::ints(&rows))];
        let build = |g: &mut Graph, t: &[TensorId]| vec![gather_rows(g, t[0], t[1]).unwrap()];
        let reference =
            |v: &[Value]| vec![Value::new(rows.len(), d, reference::gather_rows(&v[0].data, d, &ints(&v[1])))];
        check_op(&inputs, &["x"], build, reference, (BOUND, GRADIENT_BOUND));
        check_op_bf16(&inputs, &["x"], &["x"], build, reference, (BOUND, BF16_BOUNDS.1));
    }
}

#[test]
fn rows_that_repeat_often_add_up_in_order() {
    // Lists that a GPU's block sorts by comparing pairs, and longer ones that it collects; sums over many pieces.
    let rows: Vec<i32> = (0..5000).map(|i| if i % 3 == 0 { 7 } else { i * i % 11 }).collect();
    let dy = Value::random(rows.len(), 6, 3);
    let mut expected = Value::new(12, 6, vec![0.0; 72]);
    for (i, &r) in rows.iter().enumerate() {
        (0..6).for_each(|c| expected.data[r as usize * 6 + c] += dy.at(i, c));
    }
    let mut case = Case::new();
    let x = case.input("x", &Value::random(12, 6, 1));
    let rows = case.input("rows", &Value::ints(&rows));
    let seed = case.input("seed", &dy);
    let y = gather_rows(&mut case.graph, x, rows).unwrap();
    let dx = case.graph.backward(&[(y, seed)], &[x], Recompute::Nothing).unwrap()[0].unwrap();
    case.output("dx", dx);
    case.run_everywhere(|place, out| {
        let error = expected.error(&out["dx"]);
        assert!(error <= LONG_SUM_BOUND, "{place}: {error:.2e}");
    });
}

#[test]
fn rows_that_do_not_exist_are_nan_and_have_no_gradient() {
    let mut case = Case::new();
    let x = case.input("x", &Value::random(3, 2, 1));
    let rows = case.input("rows", &Value::ints(&[3, -1, i32::MIN, i32::MAX, 1]));
    let seed = case.input("seed", &Value::new(5, 2, vec![1.0; 10]));
    let y = gather_rows(&mut case.graph, x, rows).unwrap();
    let dx = case.graph.backward(&[(y, seed)], &[x], Recompute::Nothing).unwrap()[0].unwrap();
    case.output("y", y);
    case.output("dx", dx);
    case.run_everywhere(|_, out| {
        assert!(out["y"].data[..8].iter().all(|v| v.is_nan()));
        assert!(out["y"].data[8..].iter().all(|v| !v.is_nan()));
        assert_eq!(out["dx"].data, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
    });
}

#[test]
fn row_numbers_must_be_integers_in_one_row() {
    let mut case = Case::new();
    let x = case.input("x", &Value::random(3, 2, 1));
    let message = gather_rows(&mut case.graph, x, x).unwrap_err().to_string();
    assert_eq!(message, "gather_rows: the row numbers must hold i32, but holds f32");
}
