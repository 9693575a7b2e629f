use super::{DiagonalScan, Part, Scanned, diagonal_scan, reference};
use crate::cpu::isa::Isa;
use crate::ops::layout::split;
use crate::ops::selective_scan::Discretisation::{self, Euler, Zoh};
use crate::ops::selective_scan::{SelectiveScan, selective_scan};
use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16};
use crate::{Graph, Pack, TensorId};

/// Bounds of the values and of the gradients, as max|difference| / max|expected|; finite differences are themselves off
/// by about 1e-8.
const BOUND: (f64, f64) = (1e-5, 2e-5);

/// A scan to test: shapes, which parts are the input's, options.
#[derive(Clone, Debug)]
struct Setup {
    lengths: Vec<usize>,
    channels: usize,
    states: usize,
    complex: bool,
    /// Whether Δ, B and C are the input's.
    selective: [bool; 3],
    /// Of the bias of Δ, D and the initial state, those that are given.
    given: [bool; 3],
    discretisation: Discretisation,
}

impl Setup {
    fn new(lengths: &[usize], channels: usize, states: usize) -> Setup {
        Setup {
            lengths: lengths.to_vec(),
            channels,
            states,
            complex: true,
            selective: [true; 3],
            given: [true; 3],
            discretisation: Euler,
        }
    }

    fn pack(&self) -> Pack {
        Pack::from_lengths(self.lengths.iter().copied()).unwrap()
    }

    fn width(&self) -> usize {
        self.states * (1 + usize::from(self.complex))
    }

    /// All operands in the order of [`Setup::build`], those that are not given as `None`.
    fn all(&self) -> Vec<(&'static str, Option<Value>)> {
        let (t, d, n, width) = (self.pack().tokens(), self.channels, self.states, self.width());
        let rows = |i: usize| if self.selective[i] { t } else { d };
        vec![
            ("x", Some(Value::random(t, d, 1))),
            ("a", Some(Value::uniform(d, n, -2.0, 0.02, 2))),
            ("b", Some(Value::random(rows(1), width, 3))),
            ("c", Some(Value::random(rows(2), width, 4))),
            ("segments", Some(Value::ints(self.pack().offsets()))),
            ("a_imag", self.complex.then(|| Value::uniform(d, n, -3.0, 9.0, 5))),
            ("dt", self.selective[0].then(|| Value::random(t, d, 6))),
            ("dt_bias", (self.given[0] || !self.selective[0]).then(|| Value::uniform(1, d, -2.0, 0.5, 7))),
            ("d", self.given[1].then(|| Value::random(1, d, 8))),
            ("initial_state", self.given[2].then(|| Value::random(self.lengths.len(), width * d, 9))),
        ]
    }

    fn inputs(&self) -> Vec<(&'static str, Value)> {
        self.all().into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    /// Puts what was given back into the places of [`Setup::all`].
    fn places<T: Copy>(&self, given: &[T]) -> Vec<Option<T>> {
        let mut given = given.iter().copied();
        self.all().iter().map(|(_, value)| value.as_ref().and_then(|_| given.next())).collect()
    }

    fn build(&self, g: &mut Graph, ids: &[TensorId]) -> Scanned {
        let t = self.places(ids);
        let part = |i: usize, t| if self.selective[i] { Part::Selective(t) } else { Part::Fixed(t) };
        let scan = DiagonalScan {
            x: ids[0],
            a: ids[1],
            b: part(1, ids[2]),
            c: part(2, ids[3]),
            segments: ids[4],
            a_imag: t[5],
            dt: t[6],
            dt_bias: t[7],
            d: t[8],
            initial_state: t[9],
            discretisation: self.discretisation,
        };
        diagonal_scan(g, scan).unwrap()
    }

    fn reference(&self, values: &[Value]) -> Vec<Value> {
        let slices: Vec<&[f64]> = values.iter().map(|v| v.data.as_slice()).collect();
        let v = self.places(&slices);
        let offsets = self.pack().offsets().to_vec();
        let segments: Vec<_> = offsets.windows(2).map(|w| w[0] as usize..w[1] as usize).collect();
        let (y, state) = reference::diagonal_scan(&reference::Operands {
            channels: self.channels,
            x: slices[0],
            a: slices[1],
            b: slices[2],
            c: slices[3],
            b_is_fixed: !self.selective[1],
            c_is_fixed: !self.selective[2],
            a_imag: v[5],
            dt: v[6],
            dt_bias: v[7],
            d: v[8],
            initial_state: v[9],
            segments: &segments,
            discretisation: self.discretisation,
        });
        let states = Value::new(self.lengths.len(), self.width() * self.channels, state);
        vec![Value::new(values[0].rows, self.channels, y), states]
    }

    /// Checks values and all gradients against the reference.
    fn check(&self) {
        let inputs = self.inputs();
        let names: Vec<&str> = inputs.iter().map(|(name, _)| *name).filter(|name| *name != "segments").collect();
        let build = |g: &mut Graph, ids: &[TensorId]| {
            let scanned = self.build(g, ids);
            vec![scanned.y, scanned.final_state]
        };
        check_op(&inputs, &names, build, |v| self.reference(v), BOUND);
    }

    /// The same on a GPU with activations in bf16.
    fn check_bf16(&self) {
        let inputs = self.inputs();
        let names: Vec<&str> = inputs.iter().map(|(name, _)| *name).filter(|name| *name != "segments").collect();
        let narrow = [("x", true), ("dt", self.selective[0]), ("b", self.selective[1]), ("c", self.selective[2])];
        let narrow: Vec<&str> = narrow.iter().filter(|(_, is)| *is).map(|(name, _)| *name).collect();
        let build = |g: &mut Graph, ids: &[TensorId]| {
            let scanned = self.build(g, ids);
            vec![scanned.y, scanned.final_state]
        };
        check_op_bf16(&inputs, &narrow, &names, build, |v| self.reference(v), BF16_BOUNDS);
    }
}

#[test]
fn every_part_selective_or_fixed() {
    for bits in 0..8 {
        let selective = [0, 1, 2].map(|i| bits >> i & 1 == 1);
        for complex in [false, true] {
            let discretisation = if (bits % 2 == 1) == complex { Euler } else { Zoh };
            Setup { selective, complex, discretisation, ..Setup::new(&[5, 0, 1, 3], 3, 2) }.check();
        }
    }
}

#[test]
fn shapes_and_operands_that_are_not_given() {
    for (channels, states, complex) in [(1, 1, false), (17, 3, true), (70, 1, true)] {
        Setup { complex, discretisation: Zoh, ..Setup::new(&[4, 2], channels, states) }.check();
    }
    for (given, selective) in [([false; 3], [true; 3]), ([false, true, false], [false, true, true])] {
        Setup { given, selective, ..Setup::new(&[6], 2, 2) }.check();
    }
    // Several chunks, in which the chunks themselves are longer, too.
    Setup::new(&[70, 3], 2, 1).check();
    Setup { complex: false, selective: [true, false, true], ..Setup::new(&[67], 1, 34) }.check();
}

#[test]
fn activations_in_bf16() {
    Setup { discretisation: Zoh, ..Setup::new(&[5, 0, 3], 35, 2) }.check_bf16();
    Setup { complex: false, selective: [false, true, false], ..Setup::new(&[6], 3, 2) }.check_bf16();
}

#[test]
fn real_and_selective_it_is_the_selective_scan() {
    let setup = Setup { complex: false, ..Setup::new(&[40, 1, 9], 20, 5) };
    let mut case = Case::new();
    let ids: Vec<TensorId> = setup.inputs().iter().map(|(name, value)| case.input(name, value)).collect();
    let found = setup.build(&mut case.graph, &ids);
    let t = setup.places(&ids);
    let scan = SelectiveScan {
        x: ids[0],
        a: ids[1],
        b: ids[2],
        c: ids[3],
        segments: ids[4],
        dt: t[6].unwrap(),
        dt_bias: t[7],
        d: t[8],
        z: None,
        initial_state: t[9],
        softplus: true,
        discretisation: Euler,
    };
    let expected = selective_scan(&mut case.graph, scan).unwrap();
    for (name, tensor) in
        [("y", found.y), ("y2", expected.y), ("state", found.final_state), ("state2", expected.final_state)]
    {
        case.output(name, tensor);
    }
    case.run_everywhere(|place, out| {
        for name in ["y", "state"] {
            let error = out[&format!("{name}2")].error(&out[name]);
            assert!(error <= BOUND.0, "{place}: {name} is off by {error}");
        }
    });
}

/// math.md, section 3: with N = 1, A = −1, B = 1 and zero-order hold, h = (1 − g) h + g x with g = σ(dt).
#[test]
fn the_gate_theorem() {
    let mut case = Case::new();
    let one = |x: f64| Value::new(1, 1, vec![x]);
    let [x, dt, a, b, h] = [0.0, f64::from(0.7f32), -1.0, 1.0, 1.0].map(one);
    let ids = [("x", x), ("dt", dt), ("a", a), ("b", b), ("h", h)].map(|(name, v)| case.input(name, &v));
    let segments = case.input("segments", &Value::ints(&[0, 1]));
    let scan = DiagonalScan {
        x: ids[0],
        dt: Some(ids[1]),
        dt_bias: None,
        a: ids[2],
        a_imag: None,
        b: Part::Selective(ids[3]),
        c: Part::Selective(ids[3]),
        d: None,
        initial_state: Some(ids[4]),
        segments,
        discretisation: Zoh,
    };
    let kept = diagonal_scan(&mut case.graph, scan).unwrap();
    let taken = diagonal_scan(&mut case.graph, DiagonalScan { x: ids[3], initial_state: None, ..scan }).unwrap();
    case.output("kept", kept.y);
    case.output("taken", taken.y);
    case.run_everywhere(|place, out| {
        for (name, expected) in [("kept", 0.331_812_227_8), ("taken", 1.0 - 0.331_812_227_8)] {
            assert!((out[name].data[0] - expected).abs() < 2e-7, "{place}: {name} is {}", out[name].data[0]);
        }
    });
}

#[test]
fn cuts_change_no_bit() {
    let whole = Setup { discretisation: Zoh, given: [true, true, false], ..Setup::new(&[75], 19, 3) };
    let values = whole.inputs();
    for isa in Isa::available() {
        let mut case = Case::new();
        let ids: Vec<TensorId> = values.iter().map(|(name, value)| case.input(name, value)).collect();
        let scanned = whole.build(&mut case.graph, &ids);
        case.output("y", scanned.y);
        case.output("state", scanned.final_state);
        let expected = case.run_on(isa, 1);
        // The same rows in three calls, each of which continues the state of the one before.
        let mut state = Value::new(1, whole.width() * 19, vec![0.0; whole.width() * 19]);
        let mut y = Vec::new();
        for rows in [0..1, 1..34, 34..75] {
            let piece = Setup { lengths: vec![rows.len()], given: [true; 3], ..whole.clone() };
            let mut case = Case::new();
            let ids: Vec<TensorId> = piece
                .inputs()
                .iter()
                .map(|(name, _)| {
                    let value = values.iter().find(|(n, _)| n == name).map(|(_, v)| v);
                    match (*name, value) {
                        ("segments", _) => case.input(name, &Value::ints(piece.pack().offsets())),
                        ("initial_state", _) => case.input(name, &state),
                        (_, Some(v)) if v.rows == 75 => {
                            let data = v.data[rows.start * v.cols..rows.end * v.cols].to_vec();
                            case.input(name, &Value::new(rows.len(), v.cols, data))
                        }
                        (_, v) => case.input(name, v.unwrap()),
                    }
                })
                .collect();
            let scanned = piece.build(&mut case.graph, &ids);
            case.output("y", scanned.y);
            case.output("state", scanned.final_state);
            let out = case.run_on(isa, 1);
            y.extend_from_slice(&out["y"].data);
            state = out["state"].clone();
        }
        assert_eq!((&y, &state), (&expected["y"].data, &expected["state"]), "{isa}");
    }
}

#[test]
fn strided_operands_and_states_in_place() {
    let setup = Setup::new(&[3, 5], 6, 2);
    let inputs = setup.inputs();
    let value = |name: &str| inputs.iter().find(|(n, _)| *n == name).unwrap().1.clone();
    let mut case = Case::new();
    // x, dt, B and C are columns of one tensor.
    let names = ["x", "dt", "b", "c"];
    let columns = names.map(&value);
    let widths: Vec<usize> = columns.iter().map(|v| v.cols).collect();
    let rows = (0..8).flat_map(|r| columns.iter().flat_map(move |v| v.data[r * v.cols..][..v.cols].to_vec()));
    let rows: Vec<f64> = rows.collect();
    let together = case.input("together", &Value::new(8, widths.iter().sum(), rows));
    let parts = split(&mut case.graph, together, &widths).unwrap();
    let ids: Vec<TensorId> = inputs
        .iter()
        .map(|(name, value)| match names.iter().position(|n| n == name) {
            Some(i) => parts[i],
            None => case.input(name, value),
        })
        .collect();
    let scanned = setup.build(&mut case.graph, &ids);
    let state = *ids.last().unwrap();
    case.graph.store(scanned.final_state, state).unwrap();
    case.output("y", scanned.y);
    case.watch("state", state);
    let values: Vec<Value> = inputs.iter().map(|(_, v)| v.clone()).collect();
    let expected = setup.reference(&values);
    case.run_everywhere(|place, out| {
        for (name, expected) in ["y", "state"].into_iter().zip(&expected) {
            let error = expected.error(&out[name]);
            assert!(error <= BOUND.0, "{place}: {name} is off by {error}");
        }
    });
}

#[test]
fn what_does_not_fit_is_named() {
    let setup = Setup { selective: [false; 3], given: [false; 3], ..Setup::new(&[4], 3, 2) };
    let (t, d) = (4, 3);
    let build = |change: &dyn Fn(&mut DiagonalScan, TensorId)| {
        let mut case = Case::new();
        let ids: Vec<TensorId> = setup.inputs().iter().map(|(name, value)| case.input(name, value)).collect();
        let odd = case.input("odd", &Value::random(7, 5, 1));
        let mut scan = DiagonalScan {
            x: ids[0],
            a: ids[1],
            b: Part::Fixed(ids[2]),
            c: Part::Fixed(ids[3]),
            segments: ids[4],
            a_imag: Some(ids[5]),
            dt: None,
            dt_bias: Some(ids[6]),
            d: None,
            initial_state: None,
            discretisation: Euler,
        };
        change(&mut scan, odd);
        diagonal_scan(&mut case.graph, scan).unwrap_err().to_string()
    };
    let found = [
        build(&|scan, _| scan.dt_bias = None),
        build(&|scan, odd| scan.b = Part::Selective(odd)),
        build(&|scan, odd| scan.c = Part::Fixed(odd)),
        build(&|scan, odd| scan.a_imag = Some(odd)),
        build(&|scan, _| scan.a_imag = None),
    ];
    let expected = [
        "diagonal_scan: expected dt, its bias, or both".to_string(),
        format!("diagonal_scan: B must be [{t}, 4], but is [7, 5]"),
        format!("diagonal_scan: C must be [{d}, 4], but is [7, 5]"),
        format!("diagonal_scan: the imaginary part of A must be [{d}, 2], but is [7, 5]"),
        format!("diagonal_scan: B must be [{d}, 2], but is [{d}, 4]"),
    ];
    assert_eq!(found, expected);
}
