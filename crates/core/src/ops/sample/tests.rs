use super::{OPTIONS, Options, PROGRESS, Sample, progress, sample};
use crate::dtype::DType;
use crate::ops::testing::{Case, Value};

const ALL: Options = Options {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    vocabulary: usize::MAX,
    seed: 0,
};

fn ints(rows: usize, cols: usize, values: &[i32]) -> Value {
    Value { dtype: DType::I32, ..Value::new(rows, cols, values.iter().map(|&v| f64::from(v)).collect()) }
}

/// What is chosen of each row of logits, with options and the number of the draw of each; `None` without a GPU.
fn choose(logits: &Value, options: &[Options], draws: impl Fn(usize) -> u64, seen: Option<&Value>) -> Option<Vec<i32>> {
    let rows = logits.rows;
    let mut case = Case::new();
    let all: Vec<i32> = options.iter().flat_map(Options::row).collect();
    let counts: Vec<i32> = (0..rows).flat_map(|r| progress(draws(r))).collect();
    let s = Sample {
        logits: case.input("logits", logits),
        options: case.input("options", &ints(rows, OPTIONS, &all)),
        seen: seen.map(|s| case.input("seen", s)),
        progress: case.input("progress", &ints(rows, PROGRESS, &counts)),
        ids: case.input("ids", &ints(1, rows, &vec![7; rows])),
        mailbox: case.input("mailbox", &ints(3, rows, &vec![-2; 3 * rows])),
    };
    sample(&mut case.graph, s).unwrap();
    case.watch("ids", s.ids);
    case.watch("mailbox", s.mailbox);
    case.watch("progress", s.progress);
    let mut chosen = None;
    case.run_on_gpu(|out| {
        let ids: Vec<i32> = out["ids"].data.iter().map(|&v| v as i32).collect();
        assert_eq!(out["mailbox"].data[..rows], out["ids"].data);
        assert!(out["mailbox"].data[rows..].iter().all(|&v| v == -2.0));
        assert!((0..rows).all(|r| out["progress"].at(r, 2) == 1.0));
        chosen = Some(ids);
    });
    chosen
}

#[test]
fn the_first_of_the_likeliest() {
    let greedy = Options { temperature: 0.0, ..ALL };
    let mut logits = Value::random(4, 5000, 1);
    for (row, ids) in [(0, vec![4999]), (1, vec![17, 18, 4000]), (2, vec![0])] {
        ids.iter().for_each(|id| logits.data[row * 5000 + id] = 9.0);
    }
    logits.data[3 * 5000 + 4321] = f64::NAN;
    let Some(chosen) = choose(&logits, &[greedy; 4], |_| 0, None) else { return };
    assert_eq!(chosen, [4999, 17, 0, -1]);
    let limited = choose(&logits, &[Options { vocabulary: 4999, ..greedy }; 4], |_| 0, None).unwrap();
    assert!(limited[0] < 4999);
}

#[test]
fn a_penalty_on_what_occurred() {
    let logits = Value::new(2, 40, [vec![0.0; 35], vec![3.0, 2.0, 0.0, 0.0, 0.0], vec![-1.0; 39], vec![-0.5]].concat());
    let penalised = Options { temperature: 0.0, repetition_penalty: 2.0, ..ALL };
    let mut seen = vec![0; 4];
    (seen[1], seen[3]) = (1 << 3, 1 << 7);
    let Some(chosen) = choose(&logits, &[penalised; 2], |_| 0, Some(&ints(2, 2, &seen))) else { return };
    // 3 / 2 is below 2; −0.5 · 2 ties with the others.
    assert_eq!(chosen, [36, 0]);
}

#[test]
fn cuts_keep_exactly_the_likeliest() {
    // Probabilities 0.4, 0.3, 0.2, 0.1 in shuffled order, one row a draw.
    let draws = 400;
    let row: Vec<f64> = [0.1f64, 0.4, 0.2, 0.3].iter().map(|p| p.ln()).collect();
    let logits = Value::new(draws, 4, row.repeat(draws));
    let kept = |options: Options| -> Option<Vec<bool>> {
        let chosen = choose(&logits, &vec![options; draws], |r| r as u64, None)?;
        Some((0..4).map(|id| chosen.contains(&id)).collect())
    };
    if kept(ALL).is_none() {
        return;
    }
    let check = |options, expected: [bool; 4]| assert_eq!(kept(options).unwrap(), expected, "{options:?}");
    check(ALL, [true; 4]);
    check(Options { top_k: 2, ..ALL }, [false, true, false, true]);
    check(Options { top_p: 0.65, ..ALL }, [false, true, false, true]);
    check(Options { top_p: 0.75, ..ALL }, [false, true, true, true]);
    check(Options { min_p: 0.6, ..ALL }, [false, true, false, true]);
    check(Options { min_p: 1.0, ..ALL }, [false, true, false, false]);
    check(Options { top_k: 1, ..ALL }, [false, true, false, false]);
    check(Options { top_k: 3, top_p: 0.8, ..ALL }, [false, true, true, true]);
    check(Options { top_k: 3, top_p: 0.7, ..ALL }, [false, true, false, true]);
}

#[test]
fn of_equals_the_first_ids_are_kept() {
    let logits = Value::new(300, 3000, vec![0.5; 300 * 3000]);
    for options in [Options { top_k: 5, ..ALL }, Options { top_p: 5.0 / 3000.0 - 1e-6, ..ALL }] {
        let Some(chosen) = choose(&logits, &[options; 300], |r| r as u64, None) else { return };
        assert_eq!((0..3000).filter(|id| chosen.contains(id)).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }
}

#[test]
fn draws_follow_the_softmax() {
    let (draws, width) = (4000, 6);
    let row: Vec<f64> = (0..width).map(|i| f64::from((i as f32 * 1.3).sin())).collect();
    let logits = Value::new(draws, width, row.repeat(draws));
    for temperature in [0.5f32, 1.0, 2.0] {
        let options = Options { temperature, seed: 5 << 32 | 3, ..ALL };
        let Some(chosen) = choose(&logits, &vec![options; draws], |r| r as u64, None) else { return };
        let weights: Vec<f64> = row.iter().map(|v| (v / f64::from(temperature)).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (id, w) in weights.iter().enumerate() {
            let found = chosen.iter().filter(|&&c| c == id as i32).count() as f64 / draws as f64;
            assert!((w / sum - found).abs() < 0.03, "temperature {temperature}, id {id}: {found} for {}", w / sum);
        }
    }
}
