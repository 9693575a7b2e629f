use super::{Cell, RnnScan, Scanned, reference, rnn_scan};
use crate::graph::Recompute;
use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16, oracle, places};
use crate::{Graph, Pack, TensorId};

/// Bounds of values and gradients, as max|difference| / max|expected|.
const BOUND: (f64, f64) = (2e-6, 1e-5);

#[derive(Clone)]
struct Setup {
    cell: Cell,
    lengths: Vec<usize>,
    units: usize,
    bias: bool,
    initial_state: bool,
}

impl Setup {
    fn new(cell: Cell, lengths: &[usize], units: usize) -> Setup {
        Setup { cell, lengths: lengths.to_vec(), units, bias: true, initial_state: true }
    }

    fn pack(&self) -> Pack {
        Pack::from_lengths(self.lengths.iter().copied()).unwrap()
    }

    fn inputs(&self) -> Vec<(&'static str, Value)> {
        let width = self.cell.gates() * self.units;
        // Sums of H products about as large as x.
        let mut weight = Value::random(width, self.units, 2);
        weight.data.iter_mut().for_each(|w| *w = f64::from((*w / (self.units as f64).sqrt()) as f32));
        let mut inputs = vec![
            ("x", Value::random(self.pack().tokens(), width, 1)),
            ("weight", weight),
            ("segments", Value::ints(self.pack().offsets())),
        ];
        if self.bias {
            inputs.push(("bias", Value::random(1, width, 3)));
        }
        if self.initial_state {
            inputs.push(("initial_state", Value::random(self.lengths.len(), self.cell.state() * self.units, 4)));
        }
        inputs
    }

    fn build(&self, g: &mut Graph, ids: &[TensorId]) -> Scanned {
        let mut rest = ids[3..].iter().copied();
        let bias = if self.bias { rest.next() } else { None };
        let [x, weight, segments] = [ids[0], ids[1], ids[2]];
        rnn_scan(g, RnnScan { cell: self.cell, x, weight, bias, initial_state: rest.next(), segments }).unwrap()
    }

    fn reference(&self, v: &[Value]) -> Vec<Value> {
        let mut rest = v[3..].iter().map(|v| v.data.as_slice());
        let offsets = self.pack().offsets().to_vec();
        let segments: Vec<_> = offsets.windows(2).map(|w| w[0] as usize..w[1] as usize).collect();
        let (y, last) = reference::rnn_scan(&reference::Operands {
            cell: self.cell,
            units: self.units,
            x: &v[0].data,
            weight: &v[1].data,
            bias: if self.bias { rest.next() } else { None },
            initial_state: rest.next(),
            segments: &segments,
        });
        vec![Value::new(v[0].rows, self.units, y), Value::new(self.lengths.len(), self.cell.state() * self.units, last)]
    }

    fn check(&self) {
        let inputs = self.inputs();
        let names: Vec<&str> = inputs.iter().map(|(name, _)| *name).filter(|name| *name != "segments").collect();
        let build = |g: &mut Graph, ids: &[TensorId]| {
            let scanned = self.build(g, ids);
            vec![scanned.y, scanned.final_state]
        };
        check_op(&inputs, &names, build, |v| self.reference(v), BOUND);
        // The gradient of the matrix multiplies two rounded numbers.
        let bounds = (BF16_BOUNDS.0, 2.0 * BF16_BOUNDS.1);
        check_op_bf16(&inputs, &["x"], &names, build, |v| self.reference(v), bounds);
    }
}

#[test]
fn values_and_gradients() {
    for cell in [Cell::Lstm, Cell::Gru] {
        Setup::new(cell, &[5, 0, 1, 9, 2], 7).check();
        Setup { bias: false, ..Setup::new(cell, &[3, 4], 1) }.check();
        Setup { initial_state: false, ..Setup::new(cell, &[1, 3], 18) }.check();
        Setup { bias: false, initial_state: false, ..Setup::new(cell, &[6], 4) }.check();
    }
}

#[test]
fn agrees_with_pytorch() {
    for (name, cell) in [("lstm", Cell::Lstm), ("gru", Cell::Gru)] {
        let file = oracle(name);
        let (batch, length, units) = (file["y"].shape[0], file["y"].shape[1], file["y"].shape[2]);
        let setup = Setup::new(cell, &vec![length; batch], units);
        let of = |tensor: &str| match file[tensor].shape.len() {
            1 => file[tensor].permute(&[0], 1),
            2 => file[tensor].permute(&[0, 1], 1),
            _ => file[tensor].permute(&[0, 1, 2], 1),
        };
        let names = ["x", "weight", "segments", "bias", "initial_state"];
        let mut case = Case::new();
        let offsets = Value::ints(setup.pack().offsets());
        let value = |&name: &&str| if name == "segments" { offsets.clone() } else { of(name) };
        let ids: Vec<_> = names.iter().map(|name| case.input(name, &value(name))).collect();
        let scanned = setup.build(&mut case.graph, &ids);
        let seeds = [(scanned.y, case.input("dy", &of("dy"))), (scanned.final_state, case.input("d", &of("d_final")))];
        let wrt = [ids[0], ids[1], ids[3], ids[4]];
        let gradients = case.graph.backward(&seeds, &wrt, Recompute::Nothing).unwrap();
        let wanted = ["grad.x", "grad.weight", "grad.bias", "grad.initial_state"];
        for (name, gradient) in wanted.iter().zip(gradients) {
            case.output(name, gradient.unwrap());
        }
        case.output("y", scanned.y);
        case.output("final_state", scanned.final_state);
        case.run_everywhere(|place, out| {
            for what in wanted.iter().chain(&["y", "final_state"]) {
                let error = of(what).error(&out[*what]);
                assert!(error <= 5e-6, "{name}, {place}: {what} is off by {error:.2e}");
            }
        });
    }
}

#[test]
fn bits_depend_neither_on_cuts_nor_on_other_segments() {
    for cell in [Cell::Lstm, Cell::Gru] {
        let whole = Setup { initial_state: false, ..Setup::new(cell, &[23, 5, 40], 21) };
        let inputs = whole.inputs();
        let run = |setup: &Setup, x: Value, state: Option<&Value>, place: &str| {
            let mut case = Case::new();
            let setup = Setup { initial_state: state.is_some(), ..setup.clone() };
            let segments = Value::ints(setup.pack().offsets());
            let values = [Some(&x), Some(&inputs[1].1), Some(&segments), Some(&inputs[3].1), state];
            let ids: Vec<_> = values.iter().flatten().map(|v| case.input("t", v)).collect();
            let scanned = setup.build(&mut case.graph, &ids);
            case.output("y", scanned.y);
            case.output("state", scanned.final_state);
            let mut out = case.run_on(place, 2);
            (out.remove("y").unwrap().data, out.remove("state").unwrap())
        };
        let width = cell.gates() * whole.units;
        let rows = |rows: std::ops::Range<usize>| {
            Value::new(rows.len(), width, inputs[0].1.data[rows.start * width..rows.end * width].to_vec())
        };
        for place in places() {
            let (expected, last) = run(&whole, rows(0..68), None, &place);
            // The last segment by itself, in pieces.
            let (mut y, mut state, mut at) = (Vec::new(), None, 28);
            for len in [1, 0, 17, 22] {
                let piece = Setup { lengths: vec![len], ..whole.clone() };
                let (part, after) = run(&piece, rows(at..at + len), state.as_ref(), &place);
                y.extend(part);
                (state, at) = (Some(after), at + len);
            }
            assert_eq!(y, expected[28 * whole.units..], "{place}");
            assert_eq!(state.unwrap().data, last.data[2 * last.cols..], "{place}");
        }
    }
}

#[test]
fn rows_outside_all_segments_are_zero() {
    for cell in [Cell::Lstm, Cell::Gru] {
        let setup = Setup { initial_state: false, ..Setup::new(cell, &[9], 5) };
        let mut inputs = setup.inputs();
        inputs[2].1 = Value::ints(&[0, 3, 7]);
        let mut case = Case::new();
        let ids: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
        let y = setup.build(&mut case.graph, &ids).y;
        let dy = case.input("dy", &Value::random(9, 5, 9));
        let gradients = case.graph.backward(&[(y, dy)], &[ids[0], ids[1]], Recompute::Nothing).unwrap();
        case.output("y", y);
        case.output("dx", gradients[0].unwrap());
        case.output("dw", gradients[1].unwrap());
        case.run_everywhere(|_, out| {
            for name in ["y", "dx"] {
                let inside = 7 * out[name].cols;
                // The forget gate has nothing to forget at first.
                assert!(out[name].data[..inside].iter().any(|v| *v != 0.0), "{name}");
                assert!(out[name].data[inside..].iter().all(|v| *v == 0.0), "{name}");
            }
            assert!(out["dw"].data.iter().all(|v| v.is_finite()));
        });
    }
}

#[test]
fn mistaken_shapes_are_named_errors() {
    let setup = Setup::new(Cell::Lstm, &[3], 4);
    let message = |i: usize, value: Value| {
        let mut inputs = setup.inputs();
        inputs[i].1 = value;
        let mut case = Case::new();
        let t: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
        let [x, weight, segments, bias, state] = [t[0], t[1], t[2], t[3], t[4]];
        let rnn = RnnScan { cell: Cell::Lstm, x, weight, segments, bias: Some(bias), initial_state: Some(state) };
        rnn_scan(&mut case.graph, rnn).unwrap_err().to_string()
    };
    assert!(message(0, Value::random(3, 12, 1)).starts_with("rnn_scan: x must"));
    assert!(message(1, Value::random(12, 4, 1)).starts_with("rnn_scan: the weight must"));
    assert!(message(3, Value::random(1, 4, 1)).starts_with("rnn_scan: the bias must"));
    assert!(message(4, Value::random(1, 4, 1)).starts_with("rnn_scan: the initial state must"));
}
