use std::collections::BTreeMap;
use std::fmt::Display;

use super::{Discretisation, Scanned, SelectiveScan, chunk_len, chunk_row, reference, selective_scan};
use crate::cpu::isa::Isa;
use crate::graph::Recompute;
use crate::ops::layout::split;
use crate::ops::testing::{Case, Value, check_op, check_op_bf16, oracle};
use crate::{Graph, Pack, TensorId};

/// Bounds of the values and gradients of a scan, as max|difference| / max|expected|.
const BOUND: f64 = 1e-5;
const GRADIENT_BOUND: f64 = 1e-4;
/// Bound against finite differences, which are themselves off by about 1e-8.
const DIFFERENCES_BOUND: f64 = 2e-5;
/// Bounds with activations in bf16, whose unit roundoff is 2⁻⁸ = 3.9·10⁻³: y, dx, d dt and dz are rounded once, dB and dC
/// are sums of values that were cut to 11 bits before.
const BF16_BOUND: (f64, f64) = (4e-3, 5e-3);

type Inputs = Vec<(&'static str, Value)>;

/// A scan to test: shapes, which operands are given, options.
#[derive(Clone)]
struct Setup {
    lengths: Vec<usize>,
    channels: usize,
    d_state: usize,
    groups: usize,
    /// Of d, z, dt_bias and the initial state, those that are given.
    given: [bool; 4],
    softplus: bool,
    discretisation: Discretisation,
    /// Overrides the random A.
    a: Option<Vec<f64>>,
}

impl Setup {
    fn new(lengths: &[usize], channels: usize, d_state: usize) -> Setup {
        Setup {
            lengths: lengths.to_vec(),
            channels,
            d_state,
            groups: 1,
            given: [true; 4],
            softplus: true,
            discretisation: Discretisation::Euler,
            a: None,
        }
    }

    fn pack(&self) -> Pack {
        Pack::from_lengths(self.lengths.iter().copied()).unwrap()
    }

    fn inputs(&self) -> Inputs {
        let (t, d, n) = (self.pack().tokens(), self.channels, self.d_state);
        let a = match &self.a {
            Some(a) => Value::new(d, n, a.clone()),
            None => Value::uniform(d, n, -2.0, -0.05, 3),
        };
        // Without softplus the steps must be positive themselves.
        let dt = if self.softplus { Value::random(t, d, 2) } else { Value::uniform(t, d, 0.01, 1.0, 2) };
        let mut inputs = vec![
            ("x", Value::random(t, d, 1)),
            ("dt", dt),
            ("a", a),
            ("b", Value::random(t, self.groups * n, 4)),
            ("c", Value::random(t, self.groups * n, 5)),
            ("segments", Value::ints(self.pack().offsets())),
        ];
        let optional = [
            ("d", Value::random(1, d, 6)),
            ("z", Value::random(t, d, 7)),
            ("dt_bias", Value::uniform(1, d, 0.0, 0.5, 8)),
            ("initial_state", Value::random(self.lengths.len(), n * d, 9)),
        ];
        inputs.extend(optional.into_iter().zip(self.given).filter(|(_, given)| *given).map(|(input, _)| input));
        inputs
    }

    fn build(&self, g: &mut Graph, ids: &[TensorId]) -> Scanned {
        let mut rest = ids[6..].iter().copied();
        let mut next = |i: usize| self.given[i].then(|| rest.next().unwrap());
        let scan = SelectiveScan {
            x: ids[0],
            dt: ids[1],
            a: ids[2],
            b: ids[3],
            c: ids[4],
            segments: ids[5],
            d: next(0),
            z: next(1),
            dt_bias: next(2),
            initial_state: next(3),
            softplus: self.softplus,
            discretisation: self.discretisation,
        };
        selective_scan(g, scan).unwrap()
    }

    fn reference(&self, v: &[Value]) -> Vec<Value> {
        let mut rest = v[6..].iter().map(|v| v.data.as_slice());
        let mut next = |i: usize| self.given[i].then(|| rest.next().unwrap());
        let offsets = self.pack().offsets().to_vec();
        let segments: Vec<_> = offsets.windows(2).map(|w| w[0] as usize..w[1] as usize).collect();
        let (y, state) = reference::selective_scan(&reference::Operands {
            channels: self.channels,
            d_state: self.d_state,
            groups: self.groups,
            x: &v[0].data,
            dt: &v[1].data,
            a: &v[2].data,
            b: &v[3].data,
            c: &v[4].data,
            segments: &segments,
            d: next(0),
            z: next(1),
            dt_bias: next(2),
            initial_state: next(3),
            softplus: self.softplus,
            discretisation: self.discretisation,
        });
        vec![
            Value::new(v[0].rows, self.channels, y),
            Value::new(self.lengths.len(), self.d_state * self.channels, state),
        ]
    }

    /// Checks values and all gradients against the reference.
    fn check(&self) {
        let inputs = self.inputs();
        let names: Vec<&str> = inputs.iter().map(|(name, _)| *name).filter(|name| *name != "segments").collect();
        let build = |g: &mut Graph, ids: &[TensorId]| {
            let scanned = self.build(g, ids);
            vec![scanned.y, scanned.final_state]
        };
        check_op(&inputs, &names, build, |v| self.reference(v), (BOUND, DIFFERENCES_BOUND));
    }

    /// The same on a GPU with activations in bf16.
    fn check_bf16(&self) {
        let inputs = self.inputs();
        let names: Vec<&str> = inputs.iter().map(|(name, _)| *name).filter(|name| *name != "segments").collect();
        let build = |g: &mut Graph, ids: &[TensorId]| {
            let scanned = self.build(g, ids);
            vec![scanned.y, scanned.final_state]
        };
        check_op_bf16(&inputs, &["x", "dt", "b", "c", "z"], &names, build, |v| self.reference(v), BF16_BOUND);
    }

    /// Runs at one place and returns y, the final state and the gradients of everything.
    fn run(&self, place: impl Display, inputs: &[(&'static str, Value)]) -> BTreeMap<String, Value> {
        self.case(inputs).run_on(place, 2)
    }

    /// The scan with y, the final state and the gradients of everything.
    fn case(&self, inputs: &[(&'static str, Value)]) -> Case {
        let mut case = Case::new();
        let ids: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
        let scanned = self.build(&mut case.graph, &ids);
        let tokens = inputs[0].1.rows;
        let dy = case.input("dy", &Value::random(tokens, self.channels, 100));
        let dh = case.input("dh", &Value::random(self.lengths.len(), self.d_state * self.channels, 101));
        let wrt: Vec<_> = ids.iter().enumerate().filter(|(i, _)| *i != 5).map(|(_, &t)| t).collect();
        let seeds = [(scanned.y, dy), (scanned.final_state, dh)];
        let gradients = case.graph.backward(&seeds, &wrt, Recompute::Nothing).unwrap();
        for ((name, _), gradient) in inputs.iter().filter(|(name, _)| *name != "segments").zip(gradients) {
            case.output(&format!("grad.{name}"), gradient.unwrap());
        }
        case.output("y", scanned.y);
        case.output("final_state", scanned.final_state);
        case
    }
}

#[test]
fn agrees_with_the_oracles() {
    for name in ["s6_bare", "s6_full", "s6_groups", "s6_n16_long", "s6_n64", "s6_one_step"] {
        let file = oracle(name);
        let shape = |tensor: &str| file[tensor].shape.clone();
        let (batch, channels, length) = (shape("u")[0], shape("u")[1], shape("u")[2]);
        let setup = Setup {
            groups: shape("B")[1],
            softplus: name != "s6_bare",
            given: [file.contains_key("D"), file.contains_key("z"), file.contains_key("delta_bias"), false],
            ..Setup::new(&vec![length; batch], channels, shape("A")[1])
        };
        // (batch, channel, length) → [batch · length, channel], B and C likewise with two column axes.
        let rows = |tensor: &str| file[tensor].permute(&[0, 2, 1], 1);
        let grouped = |tensor: &str| file[tensor].permute(&[0, 3, 1, 2], 2);
        let states = |tensor: &str| file[tensor].permute(&[0, 2, 1], 2);
        let vector = |tensor: &str| file[tensor].permute(&[0], 1);
        let matrix = |tensor: &str| file[tensor].permute(&[0, 1], 1);
        let mut case = Case::new();
        let mut inputs = vec![("u", rows("u")), ("delta", rows("delta")), ("A", matrix("A"))];
        inputs.extend([("B", grouped("B")), ("C", grouped("C")), ("segments", Value::ints(setup.pack().offsets()))]);
        for optional in ["D", "z", "delta_bias"] {
            if file.contains_key(optional) {
                inputs.push((optional, if optional == "z" { rows("z") } else { vector(optional) }));
            }
        }
        let ids: Vec<_> = inputs.iter().map(|(name, value)| case.input(name, value)).collect();
        let scanned = setup.build(&mut case.graph, &ids);
        let dy = case.input("dy", &rows("dy"));
        let d_state = case.input("dlast_state", &states("dlast_state"));
        let differentiable: Vec<usize> =
            (0..ids.len()).filter(|&i| file.contains_key(&format!("grad.{}", inputs[i].0))).collect();
        let wrt: Vec<_> = differentiable.iter().map(|&i| ids[i]).collect();
        let seeds = [(scanned.y, dy), (scanned.final_state, d_state)];
        let gradients = case.graph.backward(&seeds, &wrt, Recompute::Nothing).unwrap();
        for (&i, gradient) in differentiable.iter().zip(gradients) {
            case.output(inputs[i].0, gradient.unwrap());
        }
        case.output("y", scanned.y);
        case.output("last_state", scanned.final_state);
        case.run_everywhere(|isa, out| {
            let close = |what: &str, expected: &Value, bound: f64| {
                let error = expected.error(&out[what]);
                assert!(error <= bound, "{name}, {isa}: {what} is off by {error:.2e} > {bound:.0e}");
            };
            close("y", &rows("y"), BOUND);
            close("last_state", &states("last_state"), BOUND);
            for &i in &differentiable {
                let of = inputs[i].0;
                let grad = format!("grad.{of}");
                let expected = match of {
                    "A" => matrix(&grad),
                    "B" | "C" => grouped(&grad),
                    "D" | "delta_bias" => vector(&grad),
                    _ => rows(&grad),
                };
                close(of, &expected, GRADIENT_BOUND);
            }
        });
    }
}

#[test]
fn agrees_with_the_reference_and_its_differences() {
    let full = Setup::new(&[5, 0, 1, 9], 19, 5);
    full.check();
    Setup { groups: 2, ..Setup::new(&[6, 3], 34, 4) }.check();
    Setup { groups: 3, given: [false; 4], ..Setup::new(&[7], 3, 1) }.check();
    Setup { softplus: false, given: [true, false, false, true], ..Setup::new(&[4, 4], 2, 9) }.check();
    Setup { softplus: false, given: [false, true, true, false], ..full }.check();
}

#[test]
fn zero_order_hold_agrees_with_the_reference_and_its_differences() {
    let zoh = |setup: Setup| Setup { discretisation: Discretisation::Zoh, ..setup };
    zoh(Setup::new(&[5, 0, 1, 9], 19, 5)).check();
    // At A = 0 and close to it the quotient (exp(ΔA) − 1)/A has to be its limit, and its slope a series.
    let a = vec![0.0, -1e-20, -1e-9, -1e-4, -0.01, -0.2, -5.0, -40.0];
    let mut small = zoh(Setup { a: Some(a), ..Setup::new(&[9], 2, 4) });
    let inputs = small.inputs();
    let expected = small.reference(&inputs.iter().map(|(_, v)| v.clone()).collect::<Vec<_>>());
    small.case(&inputs).run_everywhere(|place, out| {
        let errors = [expected[0].error(&out["y"]), expected[1].error(&out["final_state"])];
        assert!(errors.iter().all(|e| *e <= BOUND), "{place}: {errors:?}");
    });
    // Differences of the reference need A on one side of 0.
    small.a = Some(vec![-0.5, -0.3, -0.1, -0.05, -0.02, -0.2, -5.0, -40.0]);
    small.check();
}

#[test]
fn bf16_agrees_with_the_reference_and_its_differences() {
    Setup::new(&[5, 0, 1, 9], 40, 16).check_bf16();
    Setup { groups: 2, ..Setup::new(&[70], 6, 3) }.check_bf16();
    Setup { softplus: false, given: [false; 4], ..Setup::new(&[9], 3, 1) }.check_bf16();
    Setup { discretisation: Discretisation::Zoh, ..Setup::new(&[7, 9], 8, 5) }.check_bf16();
}

#[test]
fn many_states_agree_with_the_reference_and_its_differences() {
    for d_state in [33, 100, 140] {
        Setup::new(&[9], 3, d_state).check();
    }
}

#[test]
fn zero_order_hold_with_one_state_is_a_gate() {
    // N = 1, A = −1, B = C = 1: h = (1 − σ) h + σ x with σ = σ(dt).
    let setup =
        Setup { discretisation: Discretisation::Zoh, given: [false; 4], a: Some(vec![-1.0]), ..Setup::new(&[6], 1, 1) };
    let mut inputs = setup.inputs();
    for i in [3, 4] {
        inputs[i].1.data.fill(1.0);
    }
    let (x, dt) = (inputs[0].1.clone(), inputs[1].1.clone());
    setup.case(&inputs).run_everywhere(|place, out| {
        let mut h = 0.0;
        for t in 0..6 {
            let gate = 1.0 / (1.0 + (-dt.at(t, 0)).exp());
            h = (1.0 - gate) * h + gate * x.at(t, 0);
            assert!((h - out["y"].at(t, 0)).abs() < 1e-6, "{place}: step {t}");
        }
    });
}

#[test]
fn chunks_of_the_gradient_join() {
    let long = Setup::new(&[3, 2 * chunk_len(2) + 7, chunk_len(2)], 2, 2);
    long.check();
    Setup { discretisation: Discretisation::Zoh, ..long }.check();
}

#[test]
fn gradients_flow_from_the_final_state_alone() {
    let setup = Setup::new(&[4, 0, 3], 5, 3);
    let names = ["x", "dt", "a", "b", "dt_bias", "initial_state"];
    let build = |g: &mut Graph, ids: &[TensorId]| vec![setup.build(g, ids).final_state];
    let reference = |v: &[Value]| setup.reference(v).split_off(1);
    check_op(&setup.inputs(), &names, build, reference, (BOUND, DIFFERENCES_BOUND));
    // C, D and z have no part in it.
    let mut case = Case::new();
    let ids: Vec<_> = setup.inputs().iter().map(|(name, v)| case.input(name, v)).collect();
    let h = setup.build(&mut case.graph, &ids).final_state;
    let seed = case.input("seed", &Value::random(3, 15, 1));
    let gradients = case.graph.backward(&[(h, seed)], &[ids[4], ids[6], ids[7]], Recompute::Nothing).unwrap();
    assert_eq!(gradients, [None, None, None]);
}

#[test]
fn gradients_flow_from_the_output_alone() {
    let setup = Setup::new(&[4, 0, 3], 5, 3);
    let names = ["x", "dt", "a", "b", "c", "d", "z", "dt_bias", "initial_state"];
    let build = |g: &mut Graph, ids: &[TensorId]| vec![setup.build(g, ids).y];
    let reference = |v: &[Value]| setup.reference(v)[..1].to_vec();
    check_op(&setup.inputs(), &names, build, reference, (BOUND, DIFFERENCES_BOUND));
}

/// Rows `rows` of a value.
fn rows(value: &Value, rows: std::ops::Range<usize>) -> Value {
    let data = value.data[rows.start * value.cols..rows.end * value.cols].to_vec();
    Value { dtype: value.dtype, ..Value::new(rows.len(), value.cols, data) }
}

#[test]
fn any_cut_into_calls_gives_the_same_bits() {
    let length = 150;
    for discretisation in [Discretisation::Euler, Discretisation::Zoh] {
        let whole = Setup { discretisation, ..Setup::new(&[length], 70, 6) };
        let mut inputs = whole.inputs();
        // Decays of these steps are 0 or nearly so: their tile takes another way than those of short calls beside them.
        inputs[1].1.data[70 * 70..72 * 70].fill(300.0);
        for isa in Isa::available() {
            let expected = whole.run(isa, &inputs);
            for cuts in [vec![1, 2, 3, 40], vec![32, 64], vec![77], (1..length).collect()] {
                let mut state = inputs[9].1.clone();
                let mut y = Vec::new();
                let ends: Vec<usize> = cuts.iter().copied().chain([length]).collect();
                let starts = [0].into_iter().chain(cuts);
                for (start, end) in starts.zip(ends) {
                    let piece = Setup { lengths: vec![end - start], ..whole.clone() };
                    let mut inputs = inputs.clone();
                    for i in [0, 1, 3, 4, 7] {
                        inputs[i].1 = rows(&inputs[i].1, start..end);
                    }
                    inputs[5].1 = Value::ints(piece.pack().offsets());
                    inputs[9].1 = state;
                    let mut case = Case::new();
                    let ids: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
                    let scanned = piece.build(&mut case.graph, &ids);
                    case.output("y", scanned.y);
                    case.output("final_state", scanned.final_state);
                    let mut out = case.run_on(isa, 2);
                    y.extend(out["y"].data.clone());
                    state = out.remove("final_state").unwrap();
                }
                assert_eq!(y, expected["y"].data, "{isa}");
                assert_eq!(state, expected["final_state"], "{isa}");
            }
        }
    }
}

#[test]
fn other_segments_of_the_pack_change_no_bit() {
    // More segments than groups of them.
    let lengths: Vec<usize> = (0..150).map(|i| i % 4).collect();
    let all = Setup::new(&lengths, 20, 3);
    let inputs = all.inputs();
    for isa in Isa::available() {
        let expected = all.run(isa, &inputs);
        for segment in [0, 1, 2, 77, 149] {
            let range = all.pack().offsets()[segment] as usize..all.pack().offsets()[segment + 1] as usize;
            let alone = Setup { lengths: vec![lengths[segment]], ..all.clone() };
            let mut inputs = inputs.clone();
            for i in [0, 1, 3, 4, 7] {
                inputs[i].1 = rows(&inputs[i].1, range.clone());
            }
            inputs[5].1 = Value::ints(alone.pack().offsets());
            inputs[9].1 = rows(&inputs[9].1, segment..segment + 1);
            let out = alone.run(isa, &inputs);
            assert_eq!(out["y"], rows(&expected["y"], range), "{isa}: segment {segment}");
            let final_state = rows(&expected["final_state"], segment..segment + 1);
            assert_eq!(out["final_state"], final_state, "{isa}: segment {segment}");
        }
    }
}

#[test]
fn many_segments_sum_up_the_gradients_of_each() {
    let lengths: Vec<usize> = (0..150).map(|i| i % 4).collect();
    let all = Setup::new(&lengths, 5, 3);
    let inputs = all.inputs();
    let out = all.run(Isa::detect(), &inputs);
    // One long segment with a state that is set again and again has the same sums: check against differences.
    let values: Vec<Value> = inputs.iter().map(|(_, v)| v.clone()).collect();
    let seeds = [Value::random(225, 5, 100), Value::random(150, 15, 101)];
    let objective = |values: &[Value]| -> f64 {
        let dot = |a: &Value, b: &Value| a.data.iter().zip(&b.data).map(|(x, y)| x * y).sum::<f64>();
        all.reference(values).iter().zip(&seeds).map(|(o, s)| dot(o, s)).sum()
    };
    for (i, name) in [(2, "a"), (6, "d"), (8, "dt_bias")] {
        let gradient = &out[&format!("grad.{name}")];
        let top = gradient.data.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        for e in 0..gradient.data.len() {
            let mut shifted = values.clone();
            shifted[i].data[e] += 1e-5;
            let up = objective(&shifted);
            shifted[i].data[e] -= 2e-5;
            let expected = (up - objective(&shifted)) / 2e-5;
            assert!((expected - gradient.data[e]).abs() <= DIFFERENCES_BOUND * top, "{name}[{e}]");
        }
    }
}

#[test]
fn blocks_of_channels_and_slabs_of_rows_add_up() {
    // 130 channels are three blocks, and 70 states make the rows three slabs with chunks of 128 steps. The same
    // channels in groups of 65 or fewer... must give the same: dx and the like per channel, dB and dC as sums.
    let (channels, d_state) = (130, 70);
    let whole = Setup::new(&[3, 400, 0, 129, 260], channels, d_state);
    let inputs = whole.inputs();
    let (db_of, dc_of) = ("grad.b", "grad.c");
    for isa in [Isa::detect(), Isa::Portable] {
        let out = whole.run(isa, &inputs);
        let mut sums: BTreeMap<&str, Value> = BTreeMap::new();
        for first in (0..channels).step_by(50) {
            let width = 50.min(channels - first);
            let part = Setup { channels: width, ..whole.clone() };
            // Columns of the part; states hold one such range per state.
            let columns = |value: &Value| {
                let repeats = value.cols / channels;
                let data = (0..value.rows * repeats)
                    .flat_map(|r| value.data[r * channels + first..][..width].to_vec())
                    .collect();
                Value::new(value.rows, repeats * width, data)
            };
            let part_inputs: Vec<_> = inputs
                .iter()
                .map(|(name, value)| {
                    let value = match *name {
                        "a" => rows(value, first..first + width),
                        "b" | "c" | "segments" => value.clone(),
                        _ => columns(value),
                    };
                    (*name, value)
                })
                .collect();
            let mut case = Case::new();
            let ids: Vec<_> = part_inputs.iter().map(|(name, v)| case.input(name, v)).collect();
            let scanned = part.build(&mut case.graph, &ids);
            let dy = case.input("dy", &columns(&Value::random(inputs[0].1.rows, channels, 100)));
            let dh = case.input("dh", &columns(&Value::random(5, d_state * channels, 101)));
            let seeds = [(scanned.y, dy), (scanned.final_state, dh)];
            let names = ["x", "dt", "a", "b", "c", "d", "z", "dt_bias", "initial_state"];
            let wrt: Vec<_> =
                names.iter().map(|n| ids[part_inputs.iter().position(|(m, _)| m == n).unwrap()]).collect();
            let gradients = case.graph.backward(&seeds, &wrt, Recompute::Nothing).unwrap();
            for (name, gradient) in names.iter().zip(gradients) {
                case.output(&format!("grad.{name}"), gradient.unwrap());
            }
            let part_out = case.run_on(isa, 1);
            for name in names {
                let name = format!("grad.{name}");
                let found = &part_out[&name];
                match name.as_str() {
                    "grad.b" | "grad.c" => {
                        let key = if name == db_of { db_of } else { dc_of };
                        let sum = sums
                            .entry(key)
                            .or_insert_with(|| Value::new(found.rows, found.cols, vec![0.0; found.data.len()]));
                        sum.data.iter_mut().zip(&found.data).for_each(|(s, f)| *s += f);
                    }
                    "grad.a" => assert_eq!(*found, rows(&out[&name], first..first + width), "{isa}: {name}"),
                    _ => assert_eq!(*found, columns(&out[&name]), "{isa}: {name}"),
                }
            }
        }
        for (name, sum) in sums {
            let error = sum.error(&out[name]);
            assert!(error <= 1e-6, "{isa}: {name} is off by {error:.2e}");
        }
    }
}

#[test]
fn rows_of_kept_states_are_distinct_and_within_bounds() {
    for d_state in [1, 64, 65, 200] {
        let chunk = chunk_len(d_state);
        let lengths = [0, 1, chunk - 1, chunk, 0, chunk + 1, 3 * chunk - 1, 2, 1, 5 * chunk];
        let pack = Pack::from_lengths(lengths).unwrap();
        let mut last = None;
        for (segment, length) in lengths.into_iter().enumerate() {
            for i in 0..length.div_ceil(chunk) {
                let row = chunk_row(d_state, segment, pack.offsets()[segment] as usize, i);
                assert!(last.is_none_or(|last| row > last) && row < pack.tokens() / chunk + pack.segments());
                last = Some(row);
            }
        }
    }
}

#[test]
fn operands_may_be_columns_of_one_projection_and_gradients_land_in_one() {
    let setup = Setup { given: [false, true, false, false], ..Setup::new(&[30, 8], 21, 3) };
    let inputs = setup.inputs();
    let order = [6, 1, 0, 3, 4];
    let widths: Vec<usize> = order.iter().map(|&i| inputs[i].1.cols).collect();
    let mut joined = Vec::new();
    for r in 0..38 {
        for &i in &order {
            joined.extend(&inputs[i].1.data[r * inputs[i].1.cols..][..inputs[i].1.cols]);
        }
    }
    let joined = Value::new(38, widths.iter().sum(), joined);
    let mut case = Case::new();
    let whole = case.input("whole", &joined);
    let parts = split(&mut case.graph, whole, &widths).unwrap();
    let a = case.input("a", &inputs[2].1);
    let segments = case.input("segments", &inputs[5].1);
    let ids = [parts[2], parts[1], a, parts[3], parts[4], segments, parts[0]];
    let scanned = setup.build(&mut case.graph, &ids);
    let dy = case.input("dy", &Value::random(38, 21, 100));
    let dh = case.input("dh", &Value::random(2, 63, 101));
    let seeds = [(scanned.y, dy), (scanned.final_state, dh)];
    let gradients = case.graph.backward(&seeds, &[whole, a], Recompute::Nothing).unwrap();
    case.output("y", scanned.y);
    case.output("whole", gradients[0].unwrap());
    case.output("a", gradients[1].unwrap());
    case.run_everywhere(|place, out| {
        let expected = setup.run(place, &inputs);
        assert_eq!(out["y"], expected["y"]);
        assert_eq!(out["a"], expected["grad.a"]);
        let mut start = 0;
        for (&i, &width) in order.iter().zip(&widths) {
            let name = format!("grad.{}", inputs[i].0);
            for r in 0..38 {
                for c in 0..width {
                    assert_eq!(out["whole"].at(r, start + c), expected[&name].at(r, c), "{place}: {name} ({r}, {c})");
                }
            }
            start += width;
        }
    });
}

#[test]
fn the_final_state_may_replace_the_initial_one() {
    // On a GPU the first segment is cut into parts.
    let setup = Setup::new(&[140, 0, 1, 2], 70, 5);
    let inputs = setup.inputs();
    let mut case = Case::new();
    let ids: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
    let scanned = setup.build(&mut case.graph, &ids);
    case.output("y", scanned.y);
    case.graph.store(scanned.final_state, ids[9]).unwrap();
    case.watch("state", ids[9]);
    case.run_everywhere(|place, out| {
        let expected = setup.run(place, &inputs);
        assert_eq!(out["y"], expected["y"], "{place}");
        assert_eq!(out["state"], expected["final_state"], "{place}");
    });
}

#[test]
fn rows_outside_all_segments_are_zero() {
    let setup = Setup { given: [true, true, true, false], ..Setup::new(&[3, 4], 5, 2) };
    let inputs: Vec<_> = Setup { lengths: vec![10], ..setup.clone() }
        .inputs()
        .into_iter()
        .map(|(name, v)| if name == "segments" { (name, Value::ints(&[0, 3, 7])) } else { (name, v) })
        .collect();
    setup.case(&inputs).run_everywhere(|place, out| {
        for name in ["y", "grad.x", "grad.dt", "grad.z", "grad.b", "grad.c"] {
            let value = &out[name];
            assert!(value.data[..7 * value.cols].iter().all(|v| *v != 0.0), "{place}: {name}");
            assert!(value.data[7 * value.cols..].iter().all(|v| *v == 0.0), "{place}: {name}");
        }
    });
}

#[test]
fn mistaken_shapes_are_named_errors() {
    let setup = Setup::new(&[3], 4, 2);
    let message = |change: &dyn Fn(&mut Inputs)| {
        let mut inputs = setup.inputs();
        change(&mut inputs);
        let mut case = Case::new();
        let ids: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
        let scan = SelectiveScan {
            x: ids[0],
            dt: ids[1],
            a: ids[2],
            b: ids[3],
            c: ids[4],
            segments: ids[5],
            d: Some(ids[6]),
            z: Some(ids[7]),
            dt_bias: Some(ids[8]),
            initial_state: Some(ids[9]),
            softplus: true,
            discretisation: Discretisation::Euler,
        };
        selective_scan(&mut case.graph, scan).unwrap_err().to_string()
    };
    let replace =
        |i: usize, rows: usize, cols: usize| message(&|inputs: &mut Inputs| inputs[i].1 = Value::random(rows, cols, 1));
    assert_eq!(replace(1, 3, 5), "selective_scan: dt must be [3, 4], but is [3, 5]");
    assert_eq!(replace(2, 5, 2), "selective_scan: A must be [4, any], but is [5, 2]");
    assert!(replace(3, 3, 3).contains("B of 3 columns"));
    assert!(replace(3, 3, 6).contains("3 groups"));
    assert_eq!(replace(4, 3, 4), "selective_scan: C must be [3, 2], but is [3, 4]");
    assert_eq!(replace(9, 1, 7), "selective_scan: the initial state must be [1, 8], but is [1, 7]");
    assert_eq!(
        message(&|inputs| inputs[5].1 = Value::random(1, 2, 1)),
        "selective_scan: the segment offsets must hold i32, but holds f32"
    );
}
