use super::{Attended, Attention, attention, reference};
use crate::ops::testing::{BF16_BOUNDS, CUDA, CUDA_SLACK, Case, Value, check_op, check_op_bf16, places};
use crate::{Graph, Pack, TensorId};

/// Bounds of values and gradients against f64, as max|difference| / max|expected|.
const BOUND: (f64, f64) = (2e-6, 1e-5);
/// The same in bf16, where weights and their gradients are rounded, too.
const BF16: (f64, f64) = (2.0 * BF16_BOUNDS.0, 2.0 * BF16_BOUNDS.1);

#[derive(Clone)]
struct Setup {
    lengths: Vec<usize>,
    heads: usize,
    kv_heads: usize,
    headdim: usize,
    window: usize,
    /// Tokens before each segment, where there is a state.
    before: Option<Vec<usize>>,
}

impl Setup {
    fn new(lengths: &[usize], heads: usize, kv_heads: usize, headdim: usize, window: usize) -> Setup {
        Setup { lengths: lengths.to_vec(), heads, kv_heads, headdim, window, before: None }
    }

    fn kv_width(&self) -> usize {
        self.kv_heads * self.headdim
    }

    /// Keys and values before segment `s`, all of them.
    fn history(&self, s: usize) -> (Vec<f64>, Vec<f64>) {
        let n = self.before.as_ref().map_or(0, |before| before[s]);
        // Numbers that bf16 holds, as those of a state that bf16 activations left.
        let draw = |seed| Value::random(n, self.kv_width(), seed + 10 * s as u32).to_bf16().data;
        (draw(50), draw(51))
    }

    fn inputs(&self) -> Vec<(&'static str, Value)> {
        let pack = Pack::from_lengths(self.lengths.iter().copied()).unwrap();
        let (t, kv) = (pack.tokens(), self.kv_width());
        let mut inputs = vec![
            ("q", Value::random(t, self.heads * self.headdim, 1)),
            ("k", Value::random(t, kv, 2)),
            ("v", Value::random(t, kv, 3)),
            ("segments", Value::ints(pack.offsets())),
        ];
        if let Some(before) = &self.before {
            // Slots that nothing was written to hold what must not matter.
            let mut ring =
                Value::new(before.len(), self.window * 2 * kv, vec![7.0; before.len() * self.window * 2 * kv]);
            for (s, &n) in before.iter().enumerate() {
                let (keys, values) = self.history(s);
                for p in n.saturating_sub(self.window)..n {
                    let at = s * ring.cols + p % self.window * 2 * kv;
                    ring.data[at..at + kv].copy_from_slice(&keys[p * kv..][..kv]);
                    ring.data[at + kv..at + 2 * kv].copy_from_slice(&values[p * kv..][..kv]);
                }
            }
            inputs.push((
                "position",
                Value::new(before.len(), 2, before.iter().flat_map(|&n| [n as f64, 0.0]).collect()),
            ));
            inputs.push(("kv", ring));
        }
        inputs
    }

    fn build(&self, g: &mut Graph, t: &[TensorId]) -> Attended {
        let Setup { heads, kv_heads, window, .. } = *self;
        let (position, kv) = (t.get(4).copied(), t.get(5).copied());
        attention(g, Attention { q: t[0], k: t[1], v: t[2], segments: t[3], heads, kv_heads, window, position, kv })
            .unwrap()
    }

    fn reference(&self, v: &[Value]) -> Value {
        let offsets = Pack::from_lengths(self.lengths.iter().copied()).unwrap().offsets().to_vec();
        let segments: Vec<_> = offsets.windows(2).map(|w| w[0] as usize..w[1] as usize).collect();
        let before: Vec<_> = (0..segments.len()).map(|s| self.history(s)).collect();
        let y = reference::attention(&reference::Operands {
            q: &v[0].data,
            k: &v[1].data,
            v: &v[2].data,
            heads: self.heads,
            kv_heads: self.kv_heads,
            headdim: self.headdim,
            window: self.window,
            segments: &segments,
            before: &before,
        });
        Value::new(v[0].rows, v[0].cols, y)
    }

    fn check(&self) {
        let inputs = self.inputs();
        let build = |g: &mut Graph, t: &[TensorId]| vec![self.build(g, t).y];
        check_op(&inputs, &["q", "k", "v"], build, |v| vec![self.reference(v)], BOUND);
        check_op_bf16(&inputs, &["q", "k", "v"], &["q", "k", "v"], build, |v| vec![self.reference(v)], BF16);
    }
}

#[test]
fn agrees_with_the_reference_and_its_differences() {
    Setup::new(&[5, 0, 1, 9], 2, 2, 3, 100).check();
    Setup::new(&[12, 4], 4, 2, 8, 5).check();
    Setup::new(&[7], 3, 1, 1, 1).check();
    Setup { before: Some(vec![3, 0, 9]), ..Setup::new(&[4, 2, 6], 2, 1, 4, 4) }.check();
    Setup { before: Some(vec![62, 130]), ..Setup::new(&[5, 3], 2, 2, 5, 70) }.check();
}

/// The op's output everywhere, without gradients.
fn check_outputs(setup: &Setup) {
    let inputs = setup.inputs();
    let values: Vec<Value> = inputs.iter().map(|(_, v)| v.clone()).collect();
    let mut case = Case::new();
    let ids: Vec<_> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
    let y = setup.build(&mut case.graph, &ids).y;
    case.output("y", y);
    let expected = setup.reference(&values);
    case.run_everywhere(|place, out| {
        let (error, slack) = (expected.error(&out["y"]), if place == CUDA { CUDA_SLACK } else { 1.0 });
        assert!(error <= BOUND.0 * slack, "{place}: {error:.1e}");
    });
}

#[test]
fn several_blocks_of_keys_and_tiles_of_queries() {
    for window in [40, 64, 1000] {
        check_outputs(&Setup::new(&[150, 71], 2, 1, 4, window));
    }
    // Differences along one direction, since there are many values.
    Setup::new(&[90, 70], 2, 1, 3, 50).check();
}

#[test]
fn tiles_of_all_sizes() {
    // More heads that share keys than a tile has rows, in one tile's queries and in several.
    check_outputs(&Setup::new(&[2, 0, 1], 20, 1, 3, 100));
    Setup::new(&[9], 70, 1, 2, 4).check();
    // Steps that look far back, their keys shared by warps; heads of several widths.
    for (headdim, window) in [(16, 300), (40, 100), (72, 20)] {
        let before = Some(vec![290, 0, 7, 500]);
        check_outputs(&Setup { before, ..Setup::new(&[1, 1, 0, 1], 4, 2, headdim, window) });
    }
    Setup::new(&[3, 20], 2, 1, 40, 9).check();
    check_outputs(&Setup::new(&[19], 2, 2, 130, 9));
}

/// What is left of a sequence that is taken in calls of these lengths, with the state in between.
fn in_calls(whole: &Setup, place: &str, lengths: &[usize]) -> (Vec<f64>, (Value, Value)) {
    let inputs = whole.inputs();
    let mut state: Option<(Value, Value)> = None;
    let (mut y, mut done) = (Vec::new(), 0);
    for &n in lengths {
        let mut case = Case::new();
        let part = |v: &Value| Value::new(n, v.cols, v.data[done * v.cols..(done + n) * v.cols].to_vec());
        let mut ids: Vec<_> = inputs[..3].iter().map(|(name, v)| case.input(name, &part(v))).collect();
        ids.push(case.input("segments", &Value::ints(&[0, n as i32])));
        if let Some((position, kv)) = &state {
            ids.extend([case.input("position", position), case.input("kv", kv)]);
        }
        let attended = Setup { before: Some(vec![done]), ..whole.clone() }.build(&mut case.graph, &ids);
        case.output("y", attended.y);
        if state.is_some() {
            // In place of the old one, as sessions keep it.
            case.graph.store(attended.final_position, ids[4]).unwrap();
            case.graph.store(attended.final_kv, ids[5]).unwrap();
            case.watch("position", ids[4]);
            case.watch("kv", ids[5]);
        } else {
            case.output("position", attended.final_position);
            case.output("kv", attended.final_kv);
        }
        let out = case.run_on(place, 2);
        y.extend(out["y"].data.clone());
        state = Some((out["position"].clone(), out["kv"].clone()));
        done += n;
    }
    (y, state.unwrap())
}

#[test]
fn cuts_change_no_bit() {
    for place in places() {
        for window in [1, 3, 50, 300] {
            let whole = Setup::new(&[150], 4, 2, 5, window);
            let expected = in_calls(&whole, &place, &[150]);
            assert_eq!(expected.1.0.data, [150.0, 0.0]);
            // A GPU adds up in another order where a call has few rows.
            let cuts = [&[64, 64, 22][..], &[9, 98, 0, 43], &[1; 150]];
            for lengths in &cuts[..if place == CUDA { 2 } else { 3 }] {
                let found = in_calls(&whole, &place, lengths);
                assert!(found == expected, "{place}: window {window}, {lengths:?}");
            }
        }
    }
}

#[test]
fn steps_of_a_gpu_are_near_the_whole() {
    if places().last().is_none_or(|place| place != CUDA) {
        return;
    }
    let whole = Setup::new(&[40], 4, 2, 5, 17);
    let (expected, state) = in_calls(&whole, CUDA, &[40]);
    let (found, after) = in_calls(&whole, CUDA, &[30, 1, 1, 0, 8]);
    let error = Value::new(1, expected.len(), expected).error(&Value::new(1, found.len(), found));
    assert!(error <= BOUND.0 && after == state, "{error:.1e}");
}

#[test]
fn impossible_sizes_are_named() {
    let setup = Setup::new(&[2], 4, 2, 3, 5);
    let mut case = Case::new();
    let ids: Vec<_> = setup.inputs().iter().map(|(name, v)| case.input(name, v)).collect();
    let good = Attention {
        q: ids[0],
        k: ids[1],
        v: ids[2],
        heads: 4,
        kv_heads: 2,
        window: 5,
        position: None,
        kv: None,
        segments: ids[3],
    };
    for (bad, words) in [
        (Attention { window: 0, ..good }, "the window is 0"),
        (Attention { window: usize::MAX, ..good }, "too large"),
        (Attention { heads: 5, ..good }, "12 columns of q"),
        (Attention { heads: 0, ..good }, "heads, 0"),
        (Attention { kv_heads: 3, ..good }, "3 key and value heads"),
        (Attention { kv_heads: 1, ..good }, "k must be [2, 3]"),
        (Attention { position: Some(ids[0]), ..good }, "come together"),
    ] {
        let error = attention(&mut case.graph, bad).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}
