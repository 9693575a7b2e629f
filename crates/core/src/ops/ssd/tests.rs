use super::reference::{self, Inputs, Shape};
use super::{SHORT, Ssd, ssd};
use crate::graph::Recompute;
use crate::ops::testing::{CUDA, CUDA_SLACK, Case, OracleTensor, Value, check_op, check_op_bf16, oracle};
use crate::{Graph, TensorId, rng};
use std::collections::BTreeMap;

/// Bounds on max|difference| / max|expected| against f64.
const BOUND: f64 = 1e-5;
const GRADIENT_BOUND: f64 = 1e-4;

#[derive(Clone, Copy, Debug, PartialEq)]
enum D {
    Without,
    Heads,
    Channels,
}

/// An op with its options, and random inputs for it.
#[derive(Clone, Debug)]
struct Setting {
    lengths: Vec<usize>,
    heads: usize,
    headdim: usize,
    d_state: usize,
    groups: usize,
    chunk: usize,
    d: D,
    z: bool,
    bias: bool,
    initial: bool,
    softplus: bool,
    limit: (f32, f32),
}

/// Inputs by name; absent ones are missing.
type Values = Vec<(&'static str, Value)>;

const FLOATS: [&str; 9] = ["x", "dt", "a", "b", "c", "d", "z", "dt_bias", "initial_state"];

impl Setting {
    fn new(lengths: &[usize], heads: usize, headdim: usize, d_state: usize, groups: usize, chunk: usize) -> Setting {
        Setting {
            lengths: lengths.to_vec(),
            heads,
            headdim,
            d_state,
            groups,
            chunk,
            d: D::Heads,
            z: true,
            bias: true,
            initial: true,
            softplus: true,
            limit: (0.0, f32::INFINITY),
        }
    }

    fn bare(self) -> Setting {
        Setting { d: D::Without, z: false, bias: false, initial: false, ..self }
    }

    fn values(&self, seed: u32) -> Values {
        let tokens: usize = self.lengths.iter().sum();
        let (h, p, n) = (self.heads, self.headdim, self.d_state);
        let dt = if self.softplus {
            Value::random(tokens, h, seed + 1)
        } else {
            Value::uniform(tokens, h, 0.01, 0.3, seed + 1)
        };
        let mut values = vec![
            ("x", Value::random(tokens, h * p, seed)),
            ("dt", dt),
            ("a", Value::uniform(1, h, -8.0, -0.5, seed + 2)),
            ("b", Value::random(tokens, self.groups * n, seed + 3)),
            ("c", Value::random(tokens, self.groups * n, seed + 4)),
        ];
        match self.d {
            D::Without => {}
            D::Heads => values.push(("d", Value::random(1, h, seed + 5))),
            D::Channels => values.push(("d", Value::random(1, h * p, seed + 5))),
        }
        if self.z {
            values.push(("z", Value::random(tokens, h * p, seed + 6)));
        }
        if self.bias {
            values.push(("dt_bias", Value::uniform(1, h, -4.0, -1.0, seed + 7)));
        }
        if self.initial {
            values.push(("initial_state", Value::random(self.lengths.len(), h * p * n, seed + 8)));
        }
        values.push(("segments", offsets(&self.lengths)));
        values
    }

    fn build(&self, g: &mut Graph, names: &[&str], ids: &[TensorId]) -> Vec<TensorId> {
        let find = |name: &str| names.iter().position(|n| *n == name).map(|i| ids[i]);
        let need = |name: &str| find(name).unwrap();
        let out = ssd(
            g,
            Ssd {
                x: need("x"),
                dt: need("dt"),
                a: need("a"),
                b: need("b"),
                c: need("c"),
                d: find("d"),
                z: find("z"),
                dt_bias: find("dt_bias"),
                initial_state: find("initial_state"),
                segments: need("segments"),
                headdim: self.headdim,
                d_state: self.d_state,
                chunk: self.chunk,
                softplus: self.softplus,
                dt_limit: self.limit,
            },
        )
        .unwrap();
        vec![out.y, out.final_state]
    }

    fn reference(&self, names: &[&str], values: &[Value]) -> Vec<Value> {
        let find = |name: &str| names.iter().position(|n| *n == name).map(|i| values[i].data.as_slice());
        let need = |name: &str| find(name).unwrap();
        let shape = Shape {
            heads: self.heads,
            headdim: self.headdim,
            d_state: self.d_state,
            groups: self.groups,
            softplus: self.softplus,
            dt_limit: (f64::from(self.limit.0), f64::from(self.limit.1)),
        };
        let segments: Vec<usize> = need("segments").iter().map(|&v| v as usize).collect();
        let inputs = Inputs {
            x: need("x"),
            dt: need("dt"),
            a: need("a"),
            b: need("b"),
            c: need("c"),
            d: find("d"),
            z: find("z"),
            dt_bias: find("dt_bias"),
            initial_state: find("initial_state"),
            segments: &segments,
        };
        let (y, states) = reference::ssd(&shape, &inputs);
        let (channels, count) = (self.heads * self.headdim, segments.len() - 1);
        vec![Value::new(y.len() / channels, channels, y), Value::new(count, channels * self.d_state, states)]
    }

    /// Compares outputs and, if asked, the gradients of all inputs with the reference.
    fn check(&self, seed: u32, gradients: bool) {
        let values = self.values(seed);
        let names: Vec<&str> = values.iter().map(|(n, _)| *n).collect();
        let wrt: Vec<&str> =
            if gradients { names.iter().copied().filter(|n| *n != "segments").collect() } else { Vec::new() };
        check_op(
            &values,
            &wrt,
            |g, ids| self.build(g, &names, ids),
            |v| self.reference(&names, v),
            (BOUND, GRADIENT_BOUND),
        );
    }

    /// y, the final states and the gradients of all inputs but the offsets.
    fn case(&self, values: &Values, gradients: bool) -> Case {
        let mut case = Case::new();
        let names: Vec<&str> = values.iter().map(|(n, _)| *n).collect();
        let ids: Vec<TensorId> = values.iter().map(|(n, v)| case.input(n, v)).collect();
        let outputs = self.build(&mut case.graph, &names, &ids);
        if gradients {
            let seeds: Vec<_> = outputs
                .iter()
                .enumerate()
                .map(|(i, &t)| {
                    let value = Value::random(case.graph.rows(t), case.graph.cols(t), 70 + i as u32);
                    (t, case.input("seed", &value))
                })
                .collect();
            let wrt: Vec<TensorId> = ids[..ids.len() - 1].to_vec();
            let found = case.graph.backward(&seeds, &wrt, Recompute::Nothing).unwrap();
            for (name, gradient) in names.iter().zip(found) {
                case.output(&format!("grad.{name}"), gradient.unwrap());
            }
        }
        case.output("y", outputs[0]);
        case.output("final_state", outputs[1]);
        case
    }
}

fn offsets(lengths: &[usize]) -> Value {
    let mut offsets = vec![0i32];
    for &length in lengths {
        offsets.push(offsets.last().unwrap() + length as i32);
    }
    Value::ints(&offsets)
}

fn rows(value: &Value, start: usize, end: usize) -> Value {
    Value::new(end - start, value.cols, value.data[start * value.cols..end * value.cols].to_vec())
}

/// The inputs of rows `start .. end` as one segment with another initial state.
fn piece(values: &Values, start: usize, end: usize, state: Option<Value>) -> Values {
    let mut out: Values = Vec::new();
    for (name, value) in values {
        out.push(match *name {
            "x" | "dt" | "b" | "c" | "z" => (name, rows(value, start, end)),
            "initial_state" => (name, state.clone().unwrap()),
            "segments" => (name, offsets(&[end - start])),
            _ => (name, value.clone()),
        });
    }
    out
}

#[test]
fn forward_agrees_with_the_recurrence() {
    // Shorter and longer than blocks and chunks, odd sizes, empty segments.
    Setting::new(&[70, 0, 3, 1, 130, 5], 4, 8, 16, 2, 64).check(1, false);
    Setting::new(&[300], 2, 13, 7, 1, 256).check(2, false);
    Setting { d: D::Channels, ..Setting::new(&[67, 33], 3, 33, 19, 3, 50) }.check(3, false);
    Setting::new(&[129, 64], 2, 16, 16, 1, 256).bare().check(4, false);
    Setting::new(&[9, 11], 1, 1, 1, 1, 4).check(5, false);
    Setting { softplus: false, ..Setting::new(&[200], 4, 24, 40, 2, 130) }.check(6, false);
    Setting::new(&[], 2, 3, 4, 1, 8).check(7, false);
}

#[test]
fn gradients_agree_with_finite_differences() {
    Setting::new(&[11, 0, 1, 6], 4, 3, 5, 2, 8).check(10, true);
    Setting { d: D::Channels, ..Setting::new(&[23], 2, 5, 3, 1, 7) }.check(11, true);
    Setting::new(&[9, 9], 3, 2, 17, 1, 256).bare().check(12, true);
    Setting { softplus: false, z: false, ..Setting::new(&[19], 2, 18, 2, 2, 4) }.check(13, true);
    Setting { initial: false, ..Setting::new(&[1], 2, 4, 3, 1, 16) }.check(14, true);
    // Eleven heads of a group: sets of two, the last one of one.
    Setting::new(&[5, 7], 11, 1, 2, 1, 3).check(15, true);
}

#[test]
fn the_limit_on_steps_cuts_their_gradient() {
    Setting { limit: (0.05, 0.2), ..Setting::new(&[21, 8], 4, 3, 4, 2, 8) }.check(20, true);
    Setting { limit: (0.5, 0.5), ..Setting::new(&[6], 2, 3, 4, 1, 8) }.check(21, true);
}

#[test]
fn gradients_of_long_blocks_agree_with_the_oracle_of_short_ones() {
    // Chunks of one block of 128 rows against chunks of 5 rows: other sums, the same gradients.
    let long = Setting::new(&[300, 140, 2], 6, 20, 24, 2, 256);
    let short = Setting { chunk: 5, ..long.clone() };
    let values = long.values(30);
    let expected = short.case(&values, true).run();
    long.case(&values, true).run_everywhere(|isa, got| {
        for (name, value) in &expected {
            let error = value.error(&got[name]);
            assert!(error <= GRADIENT_BOUND, "{isa}: {name} is off by {error:.2e}");
        }
    });
}

#[test]
fn either_output_alone_may_have_a_gradient() {
    let setting = Setting::new(&[40, 9], 2, 4, 6, 1, 16);
    let values = setting.values(40);
    let names: Vec<&str> = values.iter().map(|(n, _)| *n).collect();
    let wrt = &names[..names.len() - 1];
    for keep in 0..2 {
        // Without the other output, and with it scaled by zero: the same gradients.
        let mut results: Vec<BTreeMap<String, Value>> = Vec::new();
        for both in [false, true] {
            let mut case = Case::new();
            let ids: Vec<TensorId> = values.iter().map(|(n, v)| case.input(n, v)).collect();
            let outputs = setting.build(&mut case.graph, &names, &ids);
            let mut seeds = Vec::new();
            for (i, &t) in outputs.iter().enumerate() {
                let (r, c) = (case.graph.rows(t), case.graph.cols(t));
                if i == keep {
                    seeds.push((t, case.input("seed", &Value::random(r, c, 99))));
                } else if both {
                    seeds.push((t, case.input("zero", &Value::new(r, c, vec![0.0; r * c]))));
                }
            }
            let gradients = case.graph.backward(&seeds, &ids[..wrt.len()], Recompute::Nothing).unwrap();
            for (name, gradient) in wrt.iter().zip(gradients) {
                case.output(name, gradient.unwrap());
            }
            results.push(case.run());
        }
        for name in wrt {
            let (one, two) = (&results[0][*name], &results[1][*name]);
            assert!(two.error(one) <= 1e-6, "output {keep}: {name} is off by {:.2e}", two.error(one));
        }
    }
}

#[test]
fn cuts_on_the_grid_change_no_bit() {
    for (chunk, length, cuts) in
        [(32, 110, &[32, 96, 110][..]), (100, 303, &[200, 300, 303]), (64, 130, &[64, 128, 130]), (3, 10, &[3, 9, 10])]
    {
        let setting = Setting::new(&[length], 4, 12, 20, 2, chunk);
        let values = setting.values(50);
        setting.case(&values, false).run_everywhere(|isa, whole| {
            // The chunks of a GPU are its own: there cuts agree within rounding, as other cuts do.
            let same = |expected: &Value, got: &Value, what: &str| {
                let error = expected.error(got);
                let bound = if isa == CUDA { CUDA_SLACK * BOUND } else { 0.0 };
                assert!(error <= bound, "{isa}: chunk {chunk}, {what}: {error:.2e}");
            };
            let mut state = values.iter().find(|(n, _)| *n == "initial_state").map(|(_, v)| v.clone());
            let mut start = 0;
            for &end in cuts {
                let part = setting.case(&piece(&values, start, end, state), false).run_on(isa, 2);
                same(&rows(&whole["y"], start, end), &part["y"], &format!("rows {start}..{end}"));
                state = Some(part["final_state"].clone());
                start = end;
            }
            same(&whole["final_state"], &state.unwrap(), "final state");
        });
    }
}

#[test]
fn other_cuts_agree_within_rounding() {
    let setting = Setting::new(&[400], 3, 16, 16, 1, 128);
    let values = setting.values(60);
    let whole = setting.case(&values, false).run();
    for trial in 0..6u64 {
        let mut state = values.iter().find(|(n, _)| *n == "initial_state").map(|(_, v)| v.clone());
        let (mut start, mut y) = (0, Vec::new());
        while start < 400 {
            let longest = [1, 3, 10, 50, 150, 300][trial as usize];
            let end = (start + 1 + (rng::philox(7, trial << 32 | start as u64) % longest) as usize).min(400);
            let part = setting.case(&piece(&values, start, end, state), false).run();
            y.extend_from_slice(&part["y"].data);
            state = Some(part["final_state"].clone());
            start = end;
        }
        let error = whole["y"].error(&Value::new(400, 48, y));
        assert!(error <= BOUND, "y is off by {error:.2e}");
        let error = whole["final_state"].error(&state.unwrap());
        assert!(error <= BOUND, "the state is off by {error:.2e}");
    }
}

#[test]
fn rows_do_not_depend_on_what_follows() {
    let setting = Setting::new(&[150], 2, 10, 18, 1, 64);
    let values = setting.values(65);
    let state = values.iter().find(|(n, _)| *n == "initial_state").map(|(_, v)| v.clone());
    setting.case(&values, false).run_everywhere(|isa, whole| {
        for length in [SHORT + 1, 7, 8, 9, 63, 64, 70, 100, 149] {
            let part = setting.case(&piece(&values, 0, length, state.clone()), false).run_on(isa, 1);
            assert_eq!(part["y"], rows(&whole["y"], 0, length), "{isa}: {length} rows");
        }
    });
}

#[test]
fn packs_give_the_bits_of_separate_runs() {
    for trial in 0..3u32 {
        let lengths: Vec<usize> =
            (0..7).map(|i| (rng::philox(trial, i) % 150) as usize % [3, 150][i as usize % 2]).collect();
        let setting = Setting::new(&lengths, 6, 9, 12, 2, 32);
        let values = setting.values(70 + trial);
        let states = values.iter().find(|(n, _)| *n == "initial_state").map(|(_, v)| v.clone()).unwrap();
        let pack = setting.case(&values, false).run();
        let mut start = 0;
        for (s, &length) in lengths.iter().enumerate() {
            let single = Setting { lengths: vec![length], ..setting.clone() };
            let state = Some(rows(&states, s, s + 1));
            let part = single.case(&piece(&values, start, start + length, state), false).run();
            assert_eq!(part["y"], rows(&pack["y"], start, start + length));
            assert_eq!(part["final_state"], rows(&pack["final_state"], s, s + 1));
            start += length;
        }
    }
}

#[test]
fn a_long_sequence_stays_accurate() {
    let setting = Setting::new(&[5000], 2, 8, 8, 1, 256);
    setting.check(80, false);
    let values = setting.values(80);
    let expected = Setting { chunk: 16, ..setting.clone() }.case(&values, true).run();
    let got = setting.case(&values, true).run();
    for (name, value) in &expected {
        let error = value.error(&got[name]);
        assert!(error <= GRADIENT_BOUND, "{name} is off by {error:.2e}");
    }
}

#[test]
fn steps_of_very_different_size_keep_their_precision() {
    // Long steps let the sum of log a grow to thousands; the short steps after them must not suffer.
    let setting = Setting { softplus: false, ..Setting::new(&[256], 1, 4, 4, 1, 256) }.bare();
    let mut values = setting.values(85);
    for (name, value) in &mut values {
        if *name == "dt" {
            value
                .data
                .iter_mut()
                .enumerate()
                .for_each(|(t, v)| *v = if t % 64 < 8 { 20.0 } else { f64::from(1e-3f32) });
        }
    }
    let names: Vec<&str> = values.iter().map(|(n, _)| *n).collect();
    let plain: Vec<Value> = values.iter().map(|(_, v)| v.clone()).collect();
    let expected = setting.reference(&names, &plain);
    let got = setting.case(&values, false).run();
    // Rows of short steps alone, which are far smaller than the others.
    for t in (20..256).filter(|t| t % 64 >= 20) {
        let error = rows(&expected[0], t, t + 1).error(&rows(&got["y"], t, t + 1));
        assert!(error <= BOUND, "row {t} is off by {error:.2e}");
    }
}

#[test]
fn the_final_state_may_replace_the_initial_one() {
    let setting = Setting::new(&[70, 2, 0, 5], 3, 6, 10, 1, 32);
    let values = setting.values(90);
    let names: Vec<&str> = values.iter().map(|(n, _)| *n).collect();
    let mut case = Case::new();
    let ids: Vec<TensorId> = values.iter().map(|(n, v)| case.input(n, v)).collect();
    let outputs = setting.build(&mut case.graph, &names, &ids);
    case.output("y", outputs[0]);
    let state = ids[names.iter().position(|n| *n == "initial_state").unwrap()];
    case.graph.store(outputs[1], state).unwrap();
    case.watch("final_state", state);
    case.run_everywhere(|isa, _| {
        let got = case.run_on(isa, 2);
        let expected = setting.case(&values, false).run_on(isa, 2);
        assert_eq!(got["y"], expected["y"]);
        assert_eq!(got["final_state"], expected["final_state"]);
    });
}

#[test]
fn mismatched_operands_are_named_errors() {
    let setting = Setting::new(&[4], 4, 2, 3, 2, 8);
    let message = |change: &dyn Fn(&mut Ssd, &mut Case)| {
        let values = setting.values(1);
        let mut case = Case::new();
        let ids: BTreeMap<&str, TensorId> = values.iter().map(|(n, v)| (*n, case.input(n, v))).collect();
        let mut s = Ssd {
            x: ids["x"],
            dt: ids["dt"],
            a: ids["a"],
            b: ids["b"],
            c: ids["c"],
            d: Some(ids["d"]),
            z: None,
            dt_bias: None,
            initial_state: Some(ids["initial_state"]),
            segments: ids["segments"],
            headdim: 2,
            d_state: 3,
            chunk: 8,
            softplus: true,
            dt_limit: (0.0, 1.0),
        };
        change(&mut s, &mut case);
        ssd(&mut case.graph, s).unwrap_err().to_string()
    };
    assert_eq!(message(&|s, _| s.headdim = 3), "ssd: x must be [any, 12], but is [4, 8]");
    assert_eq!(message(&|s, _| s.chunk = 0), "ssd: chunk must be at least 1, but is 0");
    assert_eq!(message(&|s, _| s.dt_limit = (1.0, 0.0)), "ssd: dt_limit must be two rising numbers, but is (1, 0)");
    assert_eq!(message(&|s, _| s.c = s.x), "ssd: c must be [4, 6], but is [4, 8]");
    assert_eq!(
        message(&|s, _| s.d_state = 4),
        "ssd: the width of b must be a multiple of d_state = 4 whose quotient divides 4 heads, but is 6"
    );
    assert_eq!(
        message(&|s, case| s.d = Some(case.input("wrong", &Value::random(1, 5, 1)))),
        "ssd: d must be [1, 8], but is [1, 5]"
    );
}

/// Compares outputs and gradients with an oracle file, whose tensors have a batch instead of segments.
fn check_oracle(name: &str, limit: (f32, f32), chunk: usize) {
    let file = oracle(name);
    let shape = |name: &str| file[name].shape.clone();
    let (batch, length) = (shape("x")[0], shape("x")[1]);
    let setting = Setting {
        limit,
        ..Setting::new(&vec![length; batch], shape("x")[2], shape("x")[3], shape("B")[3], shape("B")[2], chunk)
    };
    let flat = |t: &OracleTensor| {
        let rows = if t.shape.len() >= 3 { batch } else { 1 };
        let rows = if t.shape.len() >= 3 && t.shape[1] == length && t.shape.len() < 5 { rows * length } else { rows };
        Value::new(rows, t.data.len() / rows, t.data.clone())
    };
    let state = |t: &OracleTensor| Value::new(batch, t.data.len() / batch, t.data.clone());
    let theirs = ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"];
    let convert = |key: &str, t: &OracleTensor| if key.contains("_states") { state(t) } else { flat(t) };
    let mut values: Values = Vec::new();
    for (ours, theirs) in FLOATS.into_iter().zip(theirs) {
        if let Some(t) = file.get(theirs) {
            values.push((ours, convert(theirs, t)));
        }
    }
    values.push(("segments", offsets(&setting.lengths)));
    let names: Vec<&str> = values.iter().map(|(n, _)| *n).collect();
    let mut case = Case::new();
    let ids: Vec<TensorId> = values.iter().map(|(n, v)| case.input(n, v)).collect();
    let outputs = setting.build(&mut case.graph, &names, &ids);
    let seeds = [
        (outputs[0], case.input("dy", &flat(&file["dy"]))),
        (outputs[1], case.input("dfinal", &state(&file["dfinal_states"]))),
    ];
    let gradients = case.graph.backward(&seeds, &ids[..ids.len() - 1], Recompute::Nothing).unwrap();
    for (name, gradient) in names.iter().zip(gradients) {
        case.output(&format!("grad.{name}"), gradient.unwrap());
    }
    case.output("y", outputs[0]);
    case.output("final_state", outputs[1]);
    case.run_everywhere(|isa, out| {
        let compare = |what: &str, expected: Value, bound: f64| {
            let error = expected.error(&out[what]);
            assert!(error <= bound, "{isa}: {name}: {what} is off by {error:.2e} > {bound:.0e}");
        };
        compare("y", flat(&file["y"]), BOUND);
        compare("final_state", state(&file["final_states"]), BOUND);
        for (ours, theirs) in FLOATS.into_iter().zip(theirs) {
            if let Some(t) = file.get(&format!("grad.{theirs}")) {
                compare(&format!("grad.{ours}"), convert(theirs, t), GRADIENT_BOUND);
            }
        }
    });
}

#[test]
fn agrees_with_the_oracles() {
    let open = (0.0, f32::INFINITY);
    for chunk in [256, 32] {
        check_oracle("ssd_full", open, chunk);
        check_oracle("ssd_groups", open, chunk);
        check_oracle("ssd_one_step", open, chunk);
        check_oracle("ssd_dt_limit", (0.01, 0.1), chunk);
        check_oracle("ssd_n128", open, chunk);
    }
}

/// Bounds with activations in bf16: their rounding, that of the products' operands formed from them, and that of results.
const BF16_BOUND: f64 = 1e-2;
const BF16_GRADIENT_BOUND: f64 = 2e-2;

#[test]
fn bf16_agrees_with_the_recurrence_on_a_gpu() {
    let check = |setting: Setting, seed: u32, gradients: bool| {
        let values = setting.values(seed);
        let names: Vec<&str> = values.iter().map(|(n, _)| *n).collect();
        let wrt: Vec<&str> =
            if gradients { names.iter().copied().filter(|n| *n != "segments").collect() } else { Vec::new() };
        check_op_bf16(
            &values,
            &["x", "dt", "b", "c", "z"],
            &wrt,
            |g, ids| setting.build(g, &names, ids),
            |v| setting.reference(&names, v),
            (BF16_BOUND, BF16_GRADIENT_BOUND),
        );
    };
    check(Setting::new(&[70, 0, 3, 1, 130, 5], 4, 8, 16, 2, 64), 101, false);
    check(Setting { d: D::Channels, ..Setting::new(&[67, 33], 3, 33, 19, 3, 50) }, 102, false);
    check(Setting::new(&[200], 2, 64, 128, 1, 64).bare(), 103, false);
    check(Setting::new(&[90], 1, 70, 250, 1, 64), 104, false);
    check(Setting::new(&[2, 1, 4], 4, 24, 40, 2, 64), 105, false);
    check(Setting::new(&[11, 0, 1, 6], 4, 3, 5, 2, 8), 106, true);
    check(Setting { d: D::Channels, ..Setting::new(&[23], 2, 5, 3, 1, 7) }, 107, true);
    check(Setting::new(&[9, 9], 3, 2, 17, 1, 256).bare(), 108, true);
}
