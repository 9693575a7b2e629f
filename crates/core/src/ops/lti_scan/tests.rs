use std::collections::BTreeMap;
use std::fmt::Display;

use hognose_theory::discretise::Method as Theory;
use hognose_theory::s4::Dplr;
use hognose_theory::s4d;
use num_complex::Complex64;

use super::{LtiScan, Scanned, chunk_len, chunk_row, lti_scan, reference};
use crate::graph::Recompute;
use crate::ops::layout::split;
use crate::ops::lti_discretise::{LtiDiscretise, Method, lti_discretise};
use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16};
use crate::{Graph, Pack, TensorId};

/// Bounds of the values and gradients of a scan, as max|difference| / max|expected|.
const BOUND: f64 = 1e-5;
const GRADIENT_BOUND: f64 = 2e-5;
/// Bound of an impulse response of 200 steps against the kernel in f64, whose parameters are not rounded to f32.
const IMPULSE_BOUND: f64 = 2e-5;

type Inputs = Vec<(&'static str, Value)>;

/// A scan to test.
#[derive(Clone)]
struct Setup {
    lengths: Vec<usize>,
    channels: usize,
    pairs: usize,
    rank_one: bool,
    /// Whether D and the initial state are given.
    given: [bool; 2],
}

impl Setup {
    fn new(lengths: &[usize], channels: usize, pairs: usize) -> Setup {
        Setup { lengths: lengths.to_vec(), channels, pairs, rank_one: true, given: [true; 2] }
    }

    fn diagonal(lengths: &[usize], channels: usize, pairs: usize) -> Setup {
        Setup { rank_one: false, ..Setup::new(lengths, channels, pairs) }
    }

    fn pack(&self) -> Pack {
        Pack::from_lengths(self.lengths.iter().copied()).unwrap()
    }

    fn inputs(&self) -> Inputs {
        let (t, d, n) = (self.pack().tokens(), self.channels, 2 * self.pairs);
        let mut inputs = vec![
            ("x", Value::random(t, d, 1)),
            // Inside the unit circle, with the rank-one part, too.
            ("a", Value::uniform(n, d, -0.6, 0.6, 2)),
            ("b", Value::random(n, d, 3)),
            ("c", Value::random(n, d, 4)),
            ("segments", Value::ints(self.pack().offsets())),
        ];
        if self.rank_one {
            let bound = 0.3 / (self.pairs as f32).sqrt();
            inputs.push(("u", Value::uniform(n, d, -bound, bound, 5)));
            inputs.push(("v", Value::uniform(n, d, -bound, bound, 6)));
        }
        if self.given[0] {
            inputs.push(("d", Value::random(1, d, 7)));
        }
        if self.given[1] {
            inputs.push(("initial_state", Value::random(self.lengths.len(), n * d, 8)));
        }
        inputs
    }

    fn names(&self) -> Vec<&'static str> {
        self.inputs().into_iter().map(|(name, _)| name).filter(|name| *name != "segments").collect()
    }

    fn place(&self, name: &str) -> Option<usize> {
        self.inputs().iter().position(|(n, _)| *n == name)
    }

    fn build(&self, g: &mut Graph, ids: &[TensorId]) -> Scanned {
        let optional = |name: &str| self.place(name).map(|i| ids[i]);
        let scan = LtiScan {
            x: ids[0],
            a: ids[1],
            b: ids[2],
            c: ids[3],
            segments: ids[4],
            rank_one: optional("u").zip(optional("v")).map(|(u, v)| [u, v]),
            d: optional("d"),
            initial_state: optional("initial_state"),
        };
        lti_scan(g, scan).unwrap()
    }

    fn reference(&self, v: &[Value]) -> Vec<Value> {
        let optional = |name: &str| self.place(name).map(|i| v[i].data.as_slice());
        let offsets = self.pack().offsets().to_vec();
        let segments: Vec<_> = offsets.windows(2).map(|w| w[0] as usize..w[1] as usize).collect();
        let (y, state) = reference::lti_scan(&reference::Operands {
            channels: self.channels,
            x: &v[0].data,
            a: &v[1].data,
            b: &v[2].data,
            c: &v[3].data,
            rank_one: optional("u").zip(optional("v")).map(|(u, v)| [u, v]),
            d: optional("d"),
            initial_state: optional("initial_state"),
            segments: &segments,
        });
        let width = 2 * self.pairs * self.channels;
        vec![Value::new(v[0].rows, self.channels, y), Value::new(self.lengths.len(), width, state)]
    }

    /// Checks values and all gradients against the reference.
    fn check(&self) {
        let build = |g: &mut Graph, ids: &[TensorId]| {
            let scanned = self.build(g, ids);
            vec![scanned.y, scanned.final_state]
        };
        check_op(&self.inputs(), &self.names(), build, |v| self.reference(v), (BOUND, GRADIENT_BOUND));
    }

    /// The scan with y, the final state and the gradients of everything.
    fn case(&self, inputs: &[(&'static str, Value)]) -> Case {
        let mut case = Case::new();
        let ids: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
        let scanned = self.build(&mut case.graph, &ids);
        let dy = case.input("dy", &Value::random(inputs[0].1.rows, self.channels, 100));
        let width = 2 * self.pairs * self.channels;
        let dh = case.input("dh", &Value::random(self.lengths.len(), width, 101));
        let wrt: Vec<_> = ids.iter().enumerate().filter(|(i, _)| *i != 4).map(|(_, &t)| t).collect();
        let seeds = [(scanned.y, dy), (scanned.final_state, dh)];
        let gradients = case.graph.backward(&seeds, &wrt, Recompute::Nothing).unwrap();
        for (name, gradient) in self.names().into_iter().zip(gradients) {
            case.output(&format!("grad.{name}"), gradient.unwrap());
        }
        case.output("y", scanned.y);
        case.output("final_state", scanned.final_state);
        case
    }

    fn run(&self, place: impl Display, inputs: &[(&'static str, Value)]) -> BTreeMap<String, Value> {
        self.case(inputs).run_on(place, 2)
    }
}

#[test]
fn agrees_with_the_reference_and_its_differences() {
    Setup::new(&[5, 0, 1, 9], 19, 3).check();
    Setup::diagonal(&[5, 0, 1, 9], 19, 3).check();
    Setup { given: [false; 2], ..Setup::new(&[7], 3, 1) }.check();
    Setup { given: [false; 2], ..Setup::diagonal(&[4, 4], 2, 5) }.check();
}

#[test]
fn bf16_agrees_with_the_reference_and_its_differences() {
    for setup in [Setup::new(&[5, 0, 1, 9], 19, 3), Setup::diagonal(&[70], 9, 6)] {
        let build = |g: &mut Graph, ids: &[TensorId]| {
            let scanned = setup.build(g, ids);
            vec![scanned.y, scanned.final_state]
        };
        check_op_bf16(&setup.inputs(), &["x"], &setup.names(), build, |v| setup.reference(v), BF16_BOUNDS);
    }
}

#[test]
fn many_states_and_long_segments_agree_too() {
    Setup::new(&[9], 3, 40).check();
    Setup::diagonal(&[2, 6], 3, 33).check();
    // Chunks of the gradient join.
    let lengths = [3, 2 * chunk_len(2) + 7, chunk_len(2)];
    Setup::new(&lengths, 2, 2).check();
    Setup::diagonal(&lengths, 2, 2).check();
}

#[test]
fn gradients_flow_from_either_result_alone() {
    let setup = Setup::new(&[4, 0, 3], 5, 3);
    let y = |g: &mut Graph, ids: &[TensorId]| vec![setup.build(g, ids).y];
    check_op(&setup.inputs(), &setup.names(), y, |v| setup.reference(v)[..1].to_vec(), (BOUND, GRADIENT_BOUND));
    let state = |g: &mut Graph, ids: &[TensorId]| vec![setup.build(g, ids).final_state];
    let names = ["x", "a", "b", "u", "v", "initial_state"];
    check_op(&setup.inputs(), &names, state, |v| setup.reference(v).split_off(1), (BOUND, GRADIENT_BOUND));
}

/// Rows `rows` of a value.
fn rows(value: &Value, rows: std::ops::Range<usize>) -> Value {
    Value::new(rows.len(), value.cols, value.data[rows.start * value.cols..rows.end * value.cols].to_vec())
}

#[test]
fn any_cut_into_calls_gives_the_same_bits() {
    let length = 100;
    for whole in [Setup::new(&[length], 70, 3), Setup::diagonal(&[length], 9, 3)] {
        let inputs = whole.inputs();
        let state = whole.place("initial_state").unwrap();
        for place in crate::ops::testing::places() {
            let expected = whole.run(&place, &inputs);
            for cuts in [vec![1, 2, 3, 40], vec![32, 64], (1..length).collect()] {
                let mut inputs = inputs.clone();
                let mut y = Vec::new();
                let ends: Vec<usize> = cuts.iter().copied().chain([length]).collect();
                for (start, end) in [0].into_iter().chain(cuts).zip(ends) {
                    let piece = Setup { lengths: vec![end - start], ..whole.clone() };
                    inputs[0].1 = rows(&whole.inputs()[0].1, start..end);
                    inputs[4].1 = Value::ints(piece.pack().offsets());
                    let mut case = Case::new();
                    let ids: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
                    let scanned = piece.build(&mut case.graph, &ids);
                    case.output("y", scanned.y);
                    case.output("final_state", scanned.final_state);
                    let mut out = case.run_on(&place, 2);
                    y.extend(out["y"].data.clone());
                    inputs[state].1 = out.remove("final_state").unwrap();
                }
                assert_eq!(y, expected["y"].data, "{place}");
                assert_eq!(inputs[state].1, expected["final_state"], "{place}");
            }
        }
    }
}

#[test]
fn many_segments_and_blocks_of_channels_are_independent() {
    // More segments than groups of them, and two blocks of channels.
    let lengths: Vec<usize> = (0..70).map(|i| i % 4).collect();
    let all = Setup::new(&lengths, 70, 2);
    let inputs = all.inputs();
    let state = all.place("initial_state").unwrap();
    let values: Vec<Value> = inputs.iter().map(|(_, v)| v.clone()).collect();
    let expected = all.reference(&values);
    all.case(&inputs).run_everywhere(|place, out| {
        let errors = [expected[0].error(&out["y"]), expected[1].error(&out["final_state"])];
        assert!(errors.iter().all(|e| *e <= BOUND), "{place}: {errors:?}");
        for segment in [0, 1, 2, 33, 69] {
            let range = all.pack().offsets()[segment] as usize..all.pack().offsets()[segment + 1] as usize;
            let alone = Setup { lengths: vec![lengths[segment]], ..all.clone() };
            let mut inputs = inputs.clone();
            inputs[0].1 = rows(&inputs[0].1, range.clone());
            inputs[4].1 = Value::ints(alone.pack().offsets());
            inputs[state].1 = rows(&inputs[state].1, segment..segment + 1);
            let found = alone.run(place, &inputs);
            assert_eq!(found["y"], rows(&out["y"], range), "{place}: segment {segment}");
            assert_eq!(found["final_state"], rows(&out["final_state"], segment..segment + 1), "{place}: {segment}");
        }
    });
}

#[test]
fn rows_of_kept_states_are_distinct_and_within_bounds() {
    for pairs in [1, 16, 17, 100] {
        let chunk = chunk_len(pairs);
        let lengths = [0, 1, chunk - 1, chunk, 0, chunk + 1, 3 * chunk - 1, 2, 1, 5 * chunk];
        let pack = Pack::from_lengths(lengths).unwrap();
        let mut last = None;
        for (segment, length) in lengths.into_iter().enumerate() {
            for i in 0..length.div_ceil(chunk) {
                let row = chunk_row(pairs, segment, pack.offsets()[segment] as usize, i);
                assert!(last.is_none_or(|last| row > last) && row < pack.tokens() / chunk + pack.segments());
                last = Some(row);
            }
        }
    }
}

#[test]
fn x_may_be_columns_of_a_projection_and_the_final_state_replace_the_initial_one() {
    let setup = Setup::new(&[40, 0, 1, 2], 21, 3);
    let inputs = setup.inputs();
    let x = &inputs[0].1;
    let joined = (0..x.rows).flat_map(|r| [vec![9.0; 5], x.data[r * 21..][..21].to_vec(), vec![9.0; 2]].concat());
    let joined = Value::new(x.rows, 28, joined.collect());
    let mut case = Case::new();
    let whole = case.input("whole", &joined);
    let parts = split(&mut case.graph, whole, &[5, 21, 2]).unwrap();
    let mut ids = vec![parts[1]];
    ids.extend(inputs[1..].iter().map(|(name, v)| case.input(name, v)));
    let scanned = setup.build(&mut case.graph, &ids);
    case.output("y", scanned.y);
    let state = ids[setup.place("initial_state").unwrap()];
    case.graph.store(scanned.final_state, state).unwrap();
    case.watch("state", state);
    case.run_everywhere(|place, out| {
        let expected = setup.run(place, &inputs);
        assert_eq!(out["y"], expected["y"], "{place}");
        assert_eq!(out["state"], expected["final_state"], "{place}");
    });
}

#[test]
fn rows_outside_all_segments_are_zero() {
    let setup = Setup { given: [true, false], ..Setup::new(&[3, 4], 5, 2) };
    let mut inputs = Setup { lengths: vec![10], ..setup.clone() }.inputs();
    inputs[4].1 = Value::ints(&[0, 3, 7]);
    let setup = Setup { lengths: vec![3, 4], ..setup };
    setup.case(&inputs).run_everywhere(|place, out| {
        for name in ["y", "grad.x"] {
            let value = &out[name];
            assert!(value.data[..35].iter().all(|v| *v != 0.0), "{place}: {name}");
            assert!(value.data[35..].iter().all(|v| *v == 0.0), "{place}: {name}");
        }
    });
}

/// A column of f32 numbers, and what is left of them.
fn column(values: impl IntoIterator<Item = f64>) -> Value {
    let data: Vec<f64> = values.into_iter().map(|v| f64::from(v as f32)).collect();
    Value::new(data.len(), 1, data)
}

fn complex(values: &[Complex64]) -> Value {
    column(values.iter().flat_map(|z| [z.re, z.im]))
}

/// The response of one channel to an impulse, discretised and scanned in f32, must be a kernel that the theory computes.
fn check_impulse(
    lambda: &[Complex64],
    [b, c]: [&[Complex64]; 2],
    p: Option<&[Complex64]>,
    (method, delta): (Method, f64),
    kernel: &[f64],
) {
    let mut case = Case::new();
    let given = [
        ("log_a_real", column(lambda.iter().map(|l| (-l.re).ln()))),
        ("a_imag", column(lambda.iter().map(|l| l.im))),
        ("log_dt", column([delta.ln()])),
        ("b", complex(b)),
        ("c", complex(c)),
        ("x", column((0..kernel.len()).map(|t| if t == 0 { 1.0 } else { 0.0 }))),
        ("segments", Value::ints(&[0, kernel.len() as i32])),
    ];
    let t = given.map(|(name, value)| case.input(name, &value));
    let p = p.map(|p| case.input("p", &complex(p)));
    let operands = LtiDiscretise { log_a_real: t[0], a_imag: t[1], log_dt: t[2], b: Some(t[3]), p, method };
    let made = lti_discretise(&mut case.graph, operands).unwrap();
    let scan = LtiScan {
        x: t[5],
        a: made.a,
        b: made.b,
        c: t[4],
        rank_one: made.rank_one,
        d: None,
        initial_state: None,
        segments: t[6],
    };
    let y = lti_scan(&mut case.graph, scan).unwrap().y;
    case.output("y", y);
    let expected = Value::new(kernel.len(), 1, kernel.to_vec());
    case.run_everywhere(|place, out| {
        let error = expected.error(&out["y"]);
        assert!(error <= IMPULSE_BOUND, "{place}: the kernel is off by {error:.2e}");
    });
}

#[test]
fn impulse_responses_are_the_kernels_of_s4d() {
    let inits = [s4d::Init::Lin, s4d::Init::Inv, s4d::Init::LegS, s4d::Init::Random(1), s4d::Init::Real];
    for init in inits {
        for (method, theirs) in [(Method::Zoh, Theory::ZeroOrderHold), (Method::Bilinear, Theory::BILINEAR)] {
            let model = s4d::S4d { pairs: true, ..s4d::S4d::new(init, 16, 2).unwrap() };
            let kernel = model.kernel(theirs, 0.03, 200).unwrap();
            check_impulse(&model.a, [&model.b, &model.c], None, (method, 0.03), &kernel);
        }
    }
}

#[test]
fn impulse_responses_are_the_kernels_of_s4() {
    for (n, delta) in [(2, 0.1), (16, 0.02), (64, 0.003)] {
        let c: Vec<f64> = (0..n).map(|i| (i as f64 * 1.7).sin()).collect();
        let model = Dplr::legs(&c.clone().into()).unwrap();
        let cauchy = model.kernel(delta, 200).unwrap();
        let (a, b) = hognose_theory::hippo::Measure::LegS.transition(n).unwrap();
        let dense = hognose_theory::ssm::Continuous::new(a, b, c.into(), 0.0).unwrap();
        let powers = hognose_theory::s4::kernel_by_powers(&dense, delta, 200).unwrap();
        let upper = |of: &dyn Fn(usize) -> Complex64| -> Vec<Complex64> {
            (0..n).filter(|&i| model.lambda[i].im > 0.0).map(of).collect()
        };
        let (lambda, p) = (upper(&|i| model.lambda[i]), upper(&|i| model.p[i]));
        let (b, c) = (upper(&|i| model.b[i]), upper(&|i| model.c[i]));
        for kernel in [cauchy, powers] {
            check_impulse(&lambda, [&b, &c], Some(&p), (Method::Bilinear, delta), &kernel);
        }
    }
}

#[test]
fn mistaken_shapes_are_named_errors() {
    let setup = Setup::new(&[3], 4, 2);
    let message = |i: usize, value: Value| {
        let mut inputs = setup.inputs();
        inputs[i].1 = value;
        let mut case = Case::new();
        let t: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
        let (rank_one, d, initial_state) = (Some([t[5], t[6]]), Some(t[7]), Some(t[8]));
        let scan = LtiScan { x: t[0], a: t[1], b: t[2], c: t[3], rank_one, d, initial_state, segments: t[4] };
        lti_scan(&mut case.graph, scan).unwrap_err().to_string()
    };
    assert!(message(1, Value::random(3, 4, 1)).contains("3 rows"));
    assert_eq!(message(2, Value::random(6, 4, 1)), "lti_scan: b̄ must be [4, 4], but is [6, 4]");
    assert_eq!(message(6, Value::random(4, 3, 1)), "lti_scan: v must be [4, 4], but is [4, 3]");
    assert_eq!(message(8, Value::random(1, 7, 1)), "lti_scan: the initial state must be [1, 16], but is [1, 7]");
}
