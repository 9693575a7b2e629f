use super::{CausalConv1d, Convolved, causal_conv1d, reference};
use crate::graph::Recompute;
use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16, oracle, places};
use crate::{Graph, Pack, TensorId};

/// Bounds of the values and gradients of a convolution, as max|difference| / max|expected|.
const BOUND: f64 = 1e-6;
const GRADIENT_BOUND: f64 = 1e-5;

#[derive(Clone)]
struct Setup {
    lengths: Vec<usize>,
    channels: usize,
    width: usize,
    bias: bool,
    initial_state: bool,
    silu: bool,
}

impl Setup {
    fn new(lengths: &[usize], channels: usize, width: usize) -> Setup {
        Setup { lengths: lengths.to_vec(), channels, width, bias: true, initial_state: true, silu: true }
    }

    fn pack(&self) -> Pack {
        Pack::from_lengths(self.lengths.iter().copied()).unwrap()
    }

    fn inputs(&self) -> Vec<(&'static str, Value)> {
        let mut inputs = vec![
            ("x", Value::random(self.pack().tokens(), self.channels, 1)),
            ("weight", Value::random(self.channels, self.width, 2)),
            ("segments", Value::ints(self.pack().offsets())),
        ];
        if self.bias {
            inputs.push(("bias", Value::random(1, self.channels, 3)));
        }
        if self.initial_state {
            inputs.push(("initial_state", Value::random(self.lengths.len(), (self.width - 1) * self.channels, 4)));
        }
        inputs
    }

    fn build(&self, g: &mut Graph, ids: &[TensorId]) -> Convolved {
        let mut rest = ids[3..].iter().copied();
        let bias = if self.bias { rest.next() } else { None };
        let conv = CausalConv1d {
            x: ids[0],
            weight: ids[1],
            segments: ids[2],
            bias,
            initial_state: rest.next(),
            silu: self.silu,
        };
        causal_conv1d(g, conv).unwrap()
    }

    fn reference(&self, v: &[Value]) -> Vec<Value> {
        let mut rest = v[3..].iter().map(|v| v.data.as_slice());
        let offsets = self.pack().offsets().to_vec();
        let segments: Vec<_> = offsets.windows(2).map(|w| w[0] as usize..w[1] as usize).collect();
        let bias = if self.bias { rest.next() } else { None };
        let (y, state) = reference::causal_conv1d(&reference::Operands {
            channels: self.channels,
            x: &v[0].data,
            weight: &v[1].data,
            bias,
            initial_state: rest.next(),
            segments: &segments,
            silu: self.silu,
        });
        let state_width = (self.width - 1) * self.channels;
        vec![Value::new(v[0].rows, self.channels, y), Value::new(self.lengths.len(), state_width, state)]
    }

    fn check(&self) {
        let inputs = self.inputs();
        let differentiable = |name: &&str| *name != "segments" && !(self.width == 1 && *name == "initial_state");
        let names: Vec<&str> = inputs.iter().map(|(name, _)| *name).filter(differentiable).collect();
        let build = |g: &mut Graph, ids: &[TensorId]| {
            let convolved = self.build(g, ids);
            vec![convolved.y, convolved.final_state]
        };
        check_op(&inputs, &names, build, |v| self.reference(v), (BOUND, GRADIENT_BOUND));
        check_op_bf16(&inputs, &["x"], &names, build, |v| self.reference(v), BF16_BOUNDS);
    }
}

#[test]
fn agrees_with_the_oracles() {
    for name in ["conv_silu", "conv_w2", "conv_initial_state", "conv_short"] {
        let file = oracle(name);
        let (batch, channels, length) = (file["x"].shape[0], file["x"].shape[1], file["x"].shape[2]);
        let setup = Setup {
            initial_state: file.contains_key("initial_states"),
            silu: name != "conv_w2",
            ..Setup::new(&vec![length; batch], channels, file["weight"].shape[1])
        };
        let rows = |tensor: &str| file[tensor].permute(&[0, 2, 1], 1);
        let states = |tensor: &str| file[tensor].permute(&[0, 2, 1], 2);
        let of = |tensor: &str| match tensor.trim_start_matches("grad.") {
            "weight" => file[tensor].permute(&[0, 1], 1),
            "bias" => file[tensor].permute(&[0], 1),
            "initial_states" => states(tensor),
            _ => rows(tensor),
        };
        let mut names = vec!["x", "weight", "segments", "bias"];
        names.extend(setup.initial_state.then_some("initial_states"));
        let mut case = Case::new();
        let offsets = Value::ints(setup.pack().offsets());
        let ids: Vec<_> = names
            .iter()
            .map(|&name| case.input(name, &if name == "segments" { offsets.clone() } else { of(name) }))
            .collect();
        let convolved = setup.build(&mut case.graph, &ids);
        let dy = case.input("dy", &rows("dy"));
        let d_state = case.input("dfinal_states", &states("dfinal_states"));
        names.remove(2);
        let wrt: Vec<_> = ids.iter().enumerate().filter(|(i, _)| *i != 2).map(|(_, &t)| t).collect();
        let seeds = [(convolved.y, dy), (convolved.final_state, d_state)];
        let gradients = case.graph.backward(&seeds, &wrt, Recompute::Nothing).unwrap();
        for (name, gradient) in names.iter().zip(gradients) {
            case.output(name, gradient.unwrap());
        }
        case.output("y", convolved.y);
        case.output("final_states", convolved.final_state);
        case.run_everywhere(|isa, out| {
            let close = |what: &str, expected: &Value, bound: f64| {
                let error = expected.error(&out[what]);
                assert!(error <= bound, "{name}, {isa}: {what} is off by {error:.2e} > {bound:.0e}");
            };
            close("y", &rows("y"), BOUND);
            close("final_states", &states("final_states"), 0.0);
            for name in &names {
                close(name, &of(&format!("grad.{name}")), GRADIENT_BOUND);
            }
        });
    }
}

#[test]
fn agrees_with_the_reference_and_its_differences() {
    // Segments longer than a tile, empty, and shorter than the state.
    for width in [1, 2, 3, 4, 7] {
        Setup::new(&[5, 0, 1, 70, 2, 3], 3, width).check();
    }
    // Whole accesses, over the runs that a GPU cuts, and one token a segment.
    Setup::new(&[130, 0, 5, 66], 8, 4).check();
    Setup::new(&[1, 1, 0, 1], 12, 4).check();
    let full = Setup::new(&[4, 9], 150, 4);
    Setup { bias: false, ..full.clone() }.check();
    Setup { initial_state: false, silu: false, ..full }.check();
    Setup { bias: false, initial_state: false, ..Setup::new(&[2, 40], 19, 50) }.check();
}

#[test]
fn gradients_flow_from_either_result_alone() {
    let setup = Setup::new(&[4, 0, 2], 5, 4);
    let y = |g: &mut Graph, ids: &[TensorId]| vec![setup.build(g, ids).y];
    let names = ["x", "weight", "bias", "initial_state"];
    let bounds = (BOUND, GRADIENT_BOUND);
    check_op(&setup.inputs(), &names, y, |v| setup.reference(v)[..1].to_vec(), bounds);
    let state = |g: &mut Graph, ids: &[TensorId]| vec![setup.build(g, ids).final_state];
    check_op(&setup.inputs(), &["x", "initial_state"], state, |v| setup.reference(v).split_off(1), bounds);
}

/// Rows `rows` of a value.
fn rows(value: &Value, rows: std::ops::Range<usize>) -> Value {
    let data = value.data[rows.start * value.cols..rows.end * value.cols].to_vec();
    Value { dtype: value.dtype, ..Value::new(rows.len(), value.cols, data) }
}

#[test]
fn any_cut_into_calls_gives_the_same_bits() {
    let length = 60;
    for width in [2, 4, 6] {
        for initial_state in [true, false] {
            let whole = Setup { initial_state, ..Setup::new(&[length], 21, width) };
            let inputs = whole.inputs();
            let run = |setup: &Setup, inputs: &[(&str, Value)], place: &str| {
                let mut case = Case::new();
                let ids: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
                let convolved = setup.build(&mut case.graph, &ids);
                case.output("y", convolved.y);
                case.output("final_state", convolved.final_state);
                let mut out = case.run_on(place, 2);
                (out.remove("y").unwrap(), out.remove("final_state").unwrap())
            };
            for place in places() {
                let (expected, expected_state) = run(&whole, &inputs, &place);
                for cuts in [vec![1, 2, 3, 33], vec![32], (1..length).collect()] {
                    let mut state: Option<Value> = inputs.get(4).map(|(_, v)| v.clone());
                    let mut y = Vec::new();
                    let ends: Vec<usize> = cuts.iter().copied().chain([length]).collect();
                    for (start, end) in [0].into_iter().chain(cuts).zip(ends) {
                        let piece =
                            Setup { lengths: vec![end - start], initial_state: state.is_some(), ..whole.clone() };
                        let mut inputs = inputs[..4].to_vec();
                        inputs[0].1 = rows(&inputs[0].1, start..end);
                        inputs[2].1 = Value::ints(piece.pack().offsets());
                        inputs.extend(state.take().map(|state| ("initial_state", state)));
                        let (part, after) = run(&piece, &inputs, &place);
                        y.extend(part.data);
                        state = Some(after);
                    }
                    assert_eq!(y, expected.data, "{place}: width {width}");
                    assert_eq!(state.as_ref(), Some(&expected_state), "{place}: width {width}");
                }
            }
        }
    }
}

#[test]
fn the_final_state_may_replace_the_initial_one() {
    let setup = Setup::new(&[40, 0, 1, 2, 3, 4], 150, 4);
    let inputs = setup.inputs();
    let expected = setup.reference(&inputs.iter().map(|(_, v)| v.clone()).collect::<Vec<_>>());
    let mut case = Case::new();
    let ids: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
    let convolved = setup.build(&mut case.graph, &ids);
    case.output("y", convolved.y);
    case.graph.store(convolved.final_state, ids[4]).unwrap();
    case.watch("state", ids[4]);
    case.run_everywhere(|_, out| {
        assert!(expected[0].error(&out["y"]) <= BOUND);
        assert_eq!(out["state"], expected[1]);
    });
}

#[test]
fn rows_outside_all_segments_are_zero() {
    let setup = Setup { initial_state: false, ..Setup::new(&[10], 5, 4) };
    let mut inputs = setup.inputs();
    inputs[2].1 = Value::ints(&[0, 3, 7]);
    let mut case = Case::new();
    let ids: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
    let y = setup.build(&mut case.graph, &ids).y;
    let dy = case.input("dy", &Value::random(10, 5, 9));
    let dx = case.graph.backward(&[(y, dy)], &ids[..1], Recompute::Nothing).unwrap()[0].unwrap();
    case.output("y", y);
    case.output("dx", dx);
    case.run_everywhere(|_, out| {
        for value in out.values() {
            assert!(value.data[..35].iter().all(|v| *v != 0.0) && value.data[35..].iter().all(|v| *v == 0.0));
        }
    });
}

#[test]
fn mistaken_shapes_are_named_errors() {
    let setup = Setup::new(&[3], 4, 3);
    let message = |i: usize, value: Value| {
        let mut inputs = setup.inputs();
        inputs[i].1 = value;
        let mut case = Case::new();
        let ids: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
        let conv = CausalConv1d {
            x: ids[0],
            weight: ids[1],
            bias: Some(ids[3]),
            initial_state: Some(ids[4]),
            segments: ids[2],
            silu: true,
        };
        causal_conv1d(&mut case.graph, conv).unwrap_err().to_string()
    };
    assert_eq!(message(1, Value::random(5, 3, 1)), "causal_conv1d: the weight must be [4, any], but is [5, 3]");
    assert!(message(1, Value::random(4, 0, 1)).contains("at least one tap"));
    assert_eq!(message(3, Value::random(1, 3, 1)), "causal_conv1d: the bias must be [1, 4], but is [1, 3]");
    assert_eq!(message(4, Value::random(1, 4, 1)), "causal_conv1d: the initial state must be [1, 8], but is [1, 4]");
}
