use super::{dropout, reference};
use crate::graph::Graph;
use crate::ops::layout;
use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16};
use crate::{DType, TensorId};

/// One product in f32.
const BOUND: f64 = 2e-7;
/// Bound of the gradient against finite differences in f64.
const GRADIENT_BOUND: f64 = 1e-6;

#[test]
fn agrees_with_the_reference_and_finite_differences() {
    for (rows, cols, p) in [(1, 1, 0.5), (37, 19, 0.1), (3, 40, 0.9)] {
        let seed = [7, -8, 3 * rows as i32 - 3];
        let inputs = [("x", Value::random(rows, cols, 1)), ("seed", Value::ints(&seed))];
        let build = |g: &mut Graph, t: &[TensorId]| vec![dropout(g, t[0], p, t[1], 3).unwrap()];
        let reference = |v: &[Value]| vec![Value::new(rows, cols, reference::dropout(&v[0].data, cols, p, seed, 3))];
        check_op(&inputs, &["x"], build, reference, (BOUND, GRADIENT_BOUND));
        check_op_bf16(&inputs, &["x"], &["x"], build, reference, BF16_BOUNDS);
    }
}

fn masked(p: f32, seed: [i32; 3], stream: u32) -> Vec<f64> {
    let mut case = Case::new();
    let x = case.input("x", &Value::new(100, 200, vec![1.0; 20_000]));
    let seed = case.input("seed", &Value::ints(&seed));
    let y = dropout(&mut case.graph, x, p, seed, stream).unwrap();
    case.output("y", y);
    case.run()["y"].data.clone()
}

#[test]
fn the_share_dropped_is_p_and_the_mean_stays() {
    for p in [0.05f32, 0.5, 0.8] {
        let y = masked(p, [1, 2, 0], 0);
        let n = y.len() as f64;
        let dropped = y.iter().filter(|&&v| v == 0.0).count() as f64 / n;
        // Four standard deviations of a binomial share.
        let bound = 4.0 * (f64::from(p) * (1.0 - f64::from(p)) / n).sqrt();
        assert!((dropped - f64::from(p)).abs() < bound, "{dropped} for {p}");
        let mean = y.iter().sum::<f64>() / n;
        assert!((mean - 1.0).abs() < bound / (1.0 - f64::from(p)), "mean {mean} for {p}");
    }
}

#[test]
fn seeds_and_streams_give_different_masks() {
    let masks = [([1, 2, 0], 0), ([1, 3, 0], 0), ([2, 2, 0], 0), ([1, 2, 0], 1), ([1, 2, 100], 0)]
        .map(|(seed, stream)| masked(0.5, seed, stream));
    for a in 0..masks.len() {
        for b in 0..a {
            let same = masks[a].iter().zip(&masks[b]).filter(|(x, y)| x == y).count();
            assert!((9_500..10_500).contains(&same), "masks {a} and {b} agree in {same} of 20000 places");
        }
    }
}

#[test]
fn parts_of_a_batch_draw_the_mask_of_the_whole() {
    let mut case = Case::new();
    let ones = |rows| Value::new(rows, 200, vec![1.0; 200 * rows]);
    let parts = [(60, 0), (40, 60)].map(|(rows, before)| {
        let x = case.input("x", &ones(rows));
        let seed = case.input("seed", &Value::ints(&[1, 2, before]));
        let y = dropout(&mut case.graph, x, 0.5, seed, 0).unwrap();
        case.output(&format!("y{before}"), y);
        format!("y{before}")
    });
    let out = case.run();
    assert_eq!(parts.map(|name| out[&name].data.clone()).concat(), masked(0.5, [1, 2, 0], 0));
}

#[test]
fn the_mask_does_not_depend_on_strides() {
    let (x, seed) = (Value::random(5, 9, 1), [3, 4, 0]);
    let mut case = Case::new();
    let wide = case.input("x", &x);
    let t = case.input("seed", &Value::ints(&seed));
    let part = layout::split(&mut case.graph, wide, &[2, 7]).unwrap()[1];
    let y = dropout(&mut case.graph, part, 0.5, t, 0).unwrap();
    case.output("y", y);
    let part: Vec<f64> = (0..5).flat_map(|r| (2..9).map(move |c| (r, c))).map(|(r, c)| x.at(r, c)).collect();
    case.run_everywhere(|_, out| assert_eq!(out["y"].data, reference::dropout(&part, 7, 0.5, seed, 0)));
}

#[test]
fn probability_zero_is_the_identity_and_one_is_refused() {
    let mut g = Graph::new();
    let x = g.new_tensor(DType::F32, 2, 3);
    let seed = g.new_tensor(DType::I32, 1, 3);
    let mut with = |p: f32| -> Result<TensorId, crate::Error> { dropout(&mut g, x, p, seed, 0) };
    assert_eq!(with(0.0).unwrap(), x);
    for p in [1.0, -0.1, f32::NAN] {
        assert_eq!(with(p).unwrap_err().to_string(), format!("dropout: p must lie in [0, 1), but is {p}"));
    }
}
