use super::reference::{Factors, step};
use super::{AdamW, Hyper, adamw, first_not_finite, global_norm};
use crate::ops::testing::{CUDA, Case, Value, places};
use crate::{DType, Error, Graph, TensorId};
use std::ops::Range;

/// Bound against PyTorch's AdamW in f64, relative to the largest parameter or moment. 1 − 0.95 in f32 alone is off by
/// 2e-7, which the corrections of the bias make up for in the parameters.
const TORCH_BOUND: f64 = 6e-7;
/// Bound of the norm, which is accumulated in f64 and rounded once.
const NORM_BOUND: f64 = 1e-7;

/// A graph that computes the norm and makes a step.
fn step_graph(n: usize, decayed: Vec<Range<usize>>) -> Result<Graph, Error> {
    let mut g = Graph::new();
    record(&mut g, n, decayed, false)?;
    Ok(g)
}

/// Externals params, grads, m, v, hyper, and with `shadow` the parameters rounded to bf16; then the norm.
fn record(
    g: &mut Graph,
    n: usize,
    decayed: Vec<Range<usize>>,
    shadow: bool,
) -> Result<(Vec<TensorId>, TensorId), Error> {
    let mut t: Vec<TensorId> = ["params", "grads", "m", "v"].map(|name| g.external(name, DType::F32, 1, n)).to_vec();
    t.push(g.external("hyper", DType::F32, 1, super::HYPER_LEN));
    let rounded = shadow.then(|| g.external("rounded", DType::BF16, 1, n));
    let norm = global_norm(g, t[1])?;
    adamw(g, AdamW { params: t[0], grads: t[1], m: t[2], v: t[3], hyper: t[4], norm, decayed, rounded })?;
    t.extend(rounded);
    Ok((t, norm))
}

struct State {
    params: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
    norm: f32,
}

/// Steps with these gradients and rows of hyperparameters; the state after each. A GPU also makes the rounded copy of the
/// parameters.
fn steps(
    (place, threads): (&str, usize),
    params: &[f32],
    decayed: &[Range<usize>],
    rows: &[(Vec<f32>, [f32; 8])],
) -> Vec<State> {
    let n = params.len();
    let value = |v: &[f32]| Value::new(1, v.len(), v.iter().map(|&x| f64::from(x)).collect());
    let (mut params, mut m, mut v) = (params.to_vec(), vec![0.0; n], vec![0.0; n]);
    let step = |(grads, hyper): &(Vec<f32>, [f32; 8])| {
        let mut case = Case::new();
        let (t, norm) = record(&mut case.graph, n, decayed.to_vec(), place == CUDA).unwrap();
        for (&t, v) in t.iter().zip([&params[..], grads, &m, &v, hyper]) {
            case.set(t, &value(v));
        }
        case.output("norm", norm);
        for (&t, name) in t.iter().zip(["params", "grads", "m", "v", "hyper", "rounded"]) {
            case.watch(name, t);
        }
        let out = case.run_on(place, threads);
        let read = |name: &str| out[name].data.iter().map(|&x| x as f32).collect::<Vec<f32>>();
        (params, m, v) = (read("params"), read("m"), read("v"));
        if let Some(rounded) = out.get("rounded")
            && out["norm"].data[0].is_finite()
        {
            for (i, (&got, &exact)) in rounded.data.iter().zip(&params).enumerate() {
                assert_eq!(got, half::bf16::from_f32(exact).to_f64(), "the copy of parameter {i}, {exact}");
            }
        }
        State { params: params.clone(), m: m.clone(), v: v.clone(), norm: read("norm")[0] }
    };
    rows.iter().map(step).collect()
}

/// One step of the table: lr, gradients, their norm, the parameters afterwards.
type TorchStep = (f32, [f32; 7], f64, [f64; 7]);

/// torch.optim.AdamW (2.15, float64, betas 0.9 and 0.95, eps 1e-8) after clip_grad_norm_ to 1, with a weight decay of
/// 0.1 on the first four of seven parameters.
#[rustfmt::skip]
const TORCH: [TorchStep; 5] = [
    (0.001, [0.042, -0.036, -0.02, -0.03, 0.009, -0.043, 0.055], 0.0965142477,
     [1.5398459, -0.2919707, -2.1777821, 0.5689432, -1.086, -1.398, 0.402]),
    (0.002, [-2.142, 0.245, -1.133, 0.746, -1.784, -3.018, 0.741], 4.39641388,
     [1.54088905, -0.292432992, -2.17577844, 0.567611337, -1.08455976, -1.3964501, 0.400187835]),
    (0.003, [0.437, 0.282, 0.232, 0.058, 0.379, -0.387, -0.237], 0.822958079,
     [1.54033273, -0.294304027, -2.17503759, 0.565478191, -1.08463171, -1.3939388, 0.400447861]),
    (0.002, [-0.021, -0.718, 0.519, -1.313, 0.192, 0.543, -2.219], 2.7865694,
     [1.53998603, -0.294289252, -2.17510583, 0.566042173, -1.08481454, -1.3928738, 0.401550803]),
    (0.001, [0.003, -0.01, -0.005, 0.003, -0.009, -0.0, 0.003], 0.0152643375,
     [1.53981295, -0.294264744, -2.17509681, 0.566272284, -1.0848839, -1.3924178, 0.40202116]),
];
const TORCH_START: [f32; 7] = [1.541, -0.293, -2.179, 0.568, -1.085, -1.399, 0.403];
#[rustfmt::skip]
const TORCH_M: [f64; 7] =
    [0.00225638139, 0.000352758334, 0.0149552831, -0.0270073248, 0.0070089216, -0.066674091, -0.0746701597];
#[rustfmt::skip]
const TORCH_V: [f64; 7] =
    [0.0188685878, 0.00693300031, 0.00694119042, 0.0119690893, 0.0137734913, 0.0288387038, 0.0339969973];

#[test]
fn agrees_with_torch_over_five_steps() {
    let hyper = Hyper { lr: 0.0, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_norm: 1.0 };
    let rows: Vec<_> = (1..).zip(&TORCH).map(|(t, s)| (s.1.to_vec(), Hyper { lr: s.0, ..hyper }.row(t))).collect();
    let near = |what: &str, expected: &[f64], got: &[f32]| {
        let value = |v: Vec<f64>| Value::new(1, v.len(), v);
        let got = value(got.iter().map(|&v| f64::from(v)).collect());
        let error = value(expected.to_vec()).error(&got);
        assert!(error < TORCH_BOUND, "{what} is off by {error:.1e}");
    };
    for place in places() {
        let states = steps((&place, 1), &TORCH_START, std::slice::from_ref(&(0..4)), &rows);
        for (t, (state, expected)) in states.iter().zip(&TORCH).enumerate() {
            near(&format!("{place}: the norm of step {t}"), &[expected.2], &[state.norm]);
            near(&format!("{place}: the parameters of step {t}"), &expected.3, &state.params);
        }
        near("m", &TORCH_M, &states[4].m);
        near("v", &TORCH_V, &states[4].v);
    }
}

fn random(n: usize, seed: u32) -> Vec<f32> {
    Value::random(1, n, seed).data.iter().map(|&v| v as f32).collect()
}

#[test]
fn has_the_bits_of_the_reference_at_every_level_and_number_of_threads() {
    // Several blocks and a rest; decay begins and ends inside of blocks and over their ends.
    let n = 2 * 32 * 1024 + 77;
    let decayed = [0..3, 5..5, 100..40_000, 39_000..40_001, 65_530..65_540, n - 5..n];
    let hyper = Hyper { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.2, max_norm: 0.5 };
    let (params, grads) = (random(n, 1), [random(n, 2), random(n, 3)]);
    let rows: Vec<_> = (1..).zip(&grads).map(|(t, g)| (g.clone(), hyper.row(t))).collect();
    for (place, threads) in places().iter().flat_map(|place| [(place, 1), (place, 2)]) {
        let states = steps((place, threads), &params, &decayed, &rows);
        let mut expected: Vec<_> = params.iter().map(|&p| (p, 0.0, 0.0)).collect();
        for (state, (grads, row)) in states.iter().zip(&rows) {
            let norm = grads.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            assert!((f64::from(state.norm) / norm - 1.0).abs() < NORM_BOUND);
            let factors = Factors::new(*row, state.norm);
            for (i, e) in expected.iter_mut().enumerate() {
                *e = step(&factors, e.0, grads[i], e.1, e.2, decayed.iter().any(|r| r.contains(&i)));
                let got = (state.params[i], state.m[i], state.v[i]);
                assert_eq!(got, *e, "{place}, {threads} threads: parameter {i}");
            }
        }
    }
}

/// More ranges than one launch on a GPU is told of, some next to each other inside of four parameters.
#[test]
fn hundreds_of_ranges_decay() {
    let n = 5000;
    let row = Hyper { lr: 0.1, beta1: 0.0, beta2: 0.0, eps: 1e-8, weight_decay: 0.5, max_norm: 0.0 }.row(1);
    for every in [2, 3, 12] {
        let decayed: Vec<_> = (0..400).map(|i| every * i + i % 5..every * i + i % 5 + i % (every - 1) + 1).collect();
        for place in places() {
            let state = &steps((&place, 1), &vec![1.0; n], &decayed, &[(vec![0.0; n], row)])[0];
            for (i, &p) in state.params.iter().enumerate() {
                let decays = decayed.iter().any(|r| r.contains(&i));
                assert_eq!(p, if decays { 0.95 } else { 1.0 }, "{place}: every {every}: parameter {i}");
            }
        }
    }
}

#[test]
fn without_a_largest_norm_gradients_are_not_clipped() {
    let hyper = Hyper { lr: 1.0, beta1: 0.0, beta2: 0.0, eps: 0.0, weight_decay: 0.0, max_norm: 0.0 };
    for place in places() {
        let state = &steps((&place, 1), &[1.0, 1.0], &[], &[(vec![3e4, -4e4], hyper.row(1))])[0];
        assert_eq!((&state.m[..], state.norm), (&[3e4, -4e4][..], 5e4));
        assert_eq!(state.params, [0.0, 2.0]);
    }
}

#[test]
fn a_norm_that_is_not_finite_changes_nothing() {
    let row = Hyper { lr: 0.1, beta1: 0.9, beta2: 0.9, eps: 1e-8, weight_decay: 0.1, max_norm: 1.0 }.row(1);
    for (place, bad) in places().iter().flat_map(|place| [(place, f32::NAN), (place, f32::INFINITY)]) {
        let rows = [(vec![1.0, 2.0], row), (vec![1.0, bad], row)];
        let states = steps((place, 1), &[1.0, 2.0], std::slice::from_ref(&(0..2)), &rows);
        assert!(!states[1].norm.is_finite());
        assert_eq!(states[0].params, states[1].params);
        assert_eq!((&states[0].m, &states[0].v), (&states[1].m, &states[1].v));
        assert_ne!(states[0].params, [1.0, 2.0]);
    }
}

#[test]
fn large_gradients_have_a_finite_norm() {
    let row = Hyper { lr: 0.1, beta1: 0.9, beta2: 0.9, eps: 1e-8, weight_decay: 0.1, max_norm: 1.0 }.row(1);
    for place in places() {
        let state = &steps((&place, 1), &[1.0, 2.0], &[], &[(vec![3e30, 4e30], row)])[0];
        assert_eq!(state.norm, 5e30);
        assert!((state.m[0] - 0.06).abs() < 1e-6, "clipped to norm 1: {}", state.m[0]);
    }
}

#[test]
fn wrong_operands_are_named_errors() {
    let message = |r: Result<Graph, Error>| r.unwrap_err().to_string();
    assert_eq!(
        message(step_graph(4, std::iter::once(2..5).collect())),
        "adamw: decayed ranges must lie in 0..4, but one is 2..5"
    );
    let mut g = Graph::new();
    let inner = g.new_tensor(DType::F32, 1, 4);
    let (hyper, norm) = (g.new_tensor(DType::F32, 1, 8), g.new_tensor(DType::F32, 1, 1));
    let mut with = |params: TensorId| {
        let step = AdamW { params, grads: inner, m: inner, v: inner, hyper, norm, decayed: vec![], rounded: None };
        adamw(&mut g, step).unwrap_err().to_string()
    };
    assert_eq!(with(inner), "in_place: only external tensors can be updated in place");
    assert_eq!(with(norm), "adamw: the gradients must be [1, 1], but is [1, 4]");
}

#[test]
fn the_first_number_that_is_not_finite_is_found() {
    for (bad, norm, expected) in [
        (vec![], f64::INFINITY, [-1, -1]),
        (vec![(4321, f64::NAN)], 1.0, [-1, -1]),
        (vec![(4999, f64::NAN), (4321, f64::NEG_INFINITY), (4400, f64::NAN)], f64::NAN, [4321, 0]),
        (vec![(0, f64::INFINITY)], f64::INFINITY, [0, 0]),
    ] {
        let mut x = Value::random(1, 5000, 1);
        bad.iter().for_each(|&(i, v)| x.data[i] = v);
        let mut case = Case::new();
        let (x, norm) = (case.input("x", &x), case.input("norm", &Value::new(1, 1, vec![norm])));
        let place = first_not_finite(&mut case.graph, x, norm).unwrap();
        case.output("place", place);
        case.run_everywhere(|at, out| assert_eq!(out["place"].data, expected.map(f64::from), "{at}"));
    }
}
