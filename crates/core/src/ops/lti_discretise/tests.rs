use hognose_theory::discretise::{Method as TheoryMethod, scalar};
use hognose_theory::s4::Dplr;
use num_complex::Complex64;

use super::reference::{Channel, discretise};
use super::{LtiDiscretise, Method, lti_discretise};
use crate::Graph;
use crate::TensorId;
use crate::ops::testing::{Case, Value, check_op};

/// Bounds of the values and of the gradients: results are rounded once; the special functions of a GPU take no part.
const BOUND: (f64, f64) = (1e-7, 1e-6);

fn inputs(pairs: usize, channels: usize, names: &[&'static str]) -> Vec<(&'static str, Value)> {
    let all = [
        ("log_a_real", Value::uniform(pairs, channels, -3.0, 1.0, 1)),
        ("a_imag", Value::uniform(pairs, channels, -3.0, 20.0, 2)),
        ("log_dt", Value::uniform(1, channels, -7.0, -1.0, 3)),
        ("b", Value::random(2 * pairs, channels, 4)),
        ("p", Value::random(2 * pairs, channels, 5)),
    ];
    all.into_iter().enumerate().filter(|(i, (name, _))| *i < 3 || names.contains(name)).map(|(_, x)| x).collect()
}

fn check(method: Method, pairs: usize, channels: usize, names: &[&'static str]) {
    let inputs = inputs(pairs, channels, names);
    let place = |name: &str| inputs.iter().position(|(n, _)| *n == name);
    let build = |g: &mut Graph, ids: &[TensorId]| {
        let optional = |name: &str| place(name).map(|i| ids[i]);
        let (log_a_real, a_imag, log_dt) = (ids[0], ids[1], ids[2]);
        let operands = LtiDiscretise { log_a_real, a_imag, log_dt, b: optional("b"), p: optional("p"), method };
        let made = lti_discretise(g, operands).unwrap();
        [made.a, made.b].into_iter().chain(made.rank_one.into_iter().flatten()).collect()
    };
    let reference = |v: &[Value]| {
        let complex = |m: &Value, channel: usize| -> Vec<Complex64> {
            (0..pairs).map(|k| Complex64::new(m.at(2 * k, channel), m.at(2 * k + 1, channel))).collect()
        };
        let mut out = vec![Value::new(2 * pairs, channels, vec![0.0; 2 * pairs * channels]); 4];
        for channel in 0..channels {
            let lambda = |m| Complex64::new(-v[0].at(m, channel).exp(), v[1].at(m, channel));
            let made = discretise(
                method,
                &Channel {
                    lambda: (0..pairs).map(lambda).collect(),
                    delta: v[2].at(0, channel).exp(),
                    b: place("b").map_or(vec![Complex64::ONE; pairs], |i| complex(&v[i], channel)),
                    p: place("p").map(|i| complex(&v[i], channel)),
                },
            );
            for (out, values) in out.iter_mut().zip([made.a, made.b, made.u, made.v]) {
                for (m, value) in values.iter().enumerate() {
                    out.data[2 * m * channels + channel] = value.re;
                    out.data[(2 * m + 1) * channels + channel] = value.im;
                }
            }
        }
        out.truncate(if place("p").is_some() { 4 } else { 2 });
        out
    };
    let names: Vec<&str> = inputs.iter().map(|(name, _)| *name).collect();
    check_op(&inputs, &names, build, reference, BOUND);
}

#[test]
fn values_and_gradients() {
    for method in [Method::Zoh, Method::Bilinear] {
        check(method, 3, 5, &["b"]);
        check(method, 1, 33, &[]);
    }
    check(Method::Bilinear, 4, 17, &["b", "p"]);
    check(Method::Bilinear, 1, 1, &["p"]);
}

#[test]
fn a_diagonal_is_discretised_as_the_theory_has_it() {
    let (lambda, b) = (Complex64::new(-0.5, 3.0), Complex64::new(0.3, -0.7));
    for (method, theirs) in [(Method::Zoh, TheoryMethod::ZeroOrderHold), (Method::Bilinear, TheoryMethod::BILINEAR)] {
        // Below and above the place where the series ends.
        for delta in [1e-7, 1e-3, 3.28e-3, 3.29e-3, 0.1, 2.0] {
            let made = discretise(method, &Channel { lambda: vec![lambda], delta, b: vec![b], p: None });
            let (a_bar, b_bar) = scalar(theirs, lambda, b, delta).unwrap();
            assert!((made.a[0] - a_bar).norm() < 1e-15 && (made.b[0] - b_bar).norm() < 1e-13 * b_bar.norm(), "{delta}");
        }
    }
}

/// One of each conjugate pair of a diagonal plus low rank model.
pub(crate) fn upper(model: &Dplr, of: impl Fn(&Dplr, usize) -> Complex64) -> Vec<Complex64> {
    (0..model.lambda.len()).filter(|&i| model.lambda[i].im > 0.0).map(|i| of(model, i)).collect()
}

#[test]
fn the_low_rank_form_is_the_bilinear_transform_of_hippo() {
    // Powers of the discrete transition, applied through u, v and one of each pair, against the dense matrix of the theory.
    let (n, delta) = (8, 0.05);
    let (a, b) = hognose_theory::hippo::Measure::LegS.transition(n).unwrap();
    let c: Vec<f64> = (0..n).map(|i| (i as f64 * 1.7).sin()).collect();
    let (dense_a, dense_b) = hognose_theory::discretise::dense(TheoryMethod::BILINEAR, &a, &b, delta).unwrap();
    let model = Dplr::legs(&c.clone().into()).unwrap();
    let lambda = upper(&model, |m, i| m.lambda[i]);
    let [b, c_row, p] = [upper(&model, |m, i| m.b[i]), upper(&model, |m, i| m.c[i]), upper(&model, |m, i| m.p[i])];
    let made = discretise(Method::Bilinear, &Channel { lambda, delta, b, p: Some(p) });
    let mut h = made.b.clone();
    let mut expected = dense_b;
    for k in 0..50 {
        let y: f64 = 2.0 * h.iter().zip(&c_row).map(|(h, c)| (h * c).re).sum::<f64>();
        let dense: f64 = expected.iter().zip(&c).map(|(h, c)| h * c).sum();
        assert!((y - dense).abs() < 1e-12, "step {k}: {y} {dense}");
        let w: f64 = 2.0 * h.iter().zip(&made.v).map(|(h, v)| (h * v).re).sum::<f64>();
        h = (0..h.len()).map(|m| made.a[m] * h[m] + made.u[m] * w).collect();
        expected = &dense_a * expected;
    }
}

#[test]
fn mistaken_operands_are_named_errors() {
    let message = |rows: usize, method: Method| {
        let mut case = Case::new();
        let ids: Vec<_> = inputs(2, 3, &["b", "p"]).iter().map(|(name, v)| case.input(name, v)).collect();
        let b = case.input("b", &Value::random(rows, 3, 1));
        let operands =
            LtiDiscretise { log_a_real: ids[0], a_imag: ids[1], log_dt: ids[2], b: Some(b), p: Some(ids[4]), method };
        lti_discretise(&mut case.graph, operands).unwrap_err().to_string()
    };
    assert_eq!(message(2, Method::Bilinear), "lti_discretise: B must be [4, 3], but is [2, 3]");
    assert!(message(4, Method::Zoh).contains("bilinear method only"));
}
