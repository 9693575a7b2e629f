use super::*;
use crate::data::store::tests::store;

const TEXTS: [&str; 4] = ["abcdefghij", "klm", "n", "opqrstuvwxyz0123456789"];

fn loader(mode: Mode, length: usize, batch: usize) -> Loader {
    Loader::new(Arc::new(store(&TEXTS)), Shape { length, batch }, mode, 7).unwrap()
}

/// The segments of a batch as (text with `^` for the boundary token, the targets as text with `$` for -1).
fn segments(batch: &Batch) -> Vec<(String, String)> {
    let token = |token: u32| if token == 256 { '^' } else { char::from(token as u8) };
    let pieces = batch.cu_seqlens.windows(2).map(|w| w[0] as usize..w[1] as usize);
    pieces
        .map(|piece| {
            let tokens = batch.tokens[piece.clone()].iter().map(|&t| token(t)).collect();
            let targets = batch.targets[piece].iter().map(|&t| u32::try_from(t).map_or('$', token));
            (tokens, targets.collect())
        })
        .collect()
}

fn check(batch: &Batch, shape: Shape) {
    assert_eq!(batch.tokens.len() as u64, shape.tokens());
    assert_eq!(batch.targets.len(), batch.tokens.len());
    assert_eq!(batch.cu_seqlens[0], 0);
    assert_eq!(batch.cu_seqlens[batch.segments()] as usize, batch.tokens.len());
    assert!(batch.cu_seqlens.windows(2).all(|w| w[0] < w[1]), "no segment is empty");
    // Every target is what follows in the document.
    for (tokens, targets) in segments(batch) {
        let follows = |text: &str| {
            let whole = format!("^{text}$");
            let mut starts = whole.match_indices(&tokens).map(|(at, _)| at);
            starts.any(|at| whole.get(at + 1..at + 1 + tokens.len()) == Some(&targets))
        };
        assert!(TEXTS.iter().any(|text| follows(text)), "{tokens} does not lead to {targets}");
    }
}

#[test]
fn packed_windows_hold_every_token_once_an_epoch() {
    // 40 tokens, boundaries included: 8 windows of 5.
    let mut loader = loader(Mode::Packed, 5, 2);
    assert_eq!(loader.batches_per_epoch(), 4.0);
    let mut orders = Vec::new();
    for epoch in 0..3 {
        let mut all = String::new();
        for _ in 0..4 {
            let batch = loader.next_batch();
            check(&batch, loader.shape());
            assert!(batch.carry_out.is_empty() && batch.carried.iter().all(Option::is_none));
            assert!(batch.cu_seqlens.contains(&5), "a window's end ends a segment");
            all.extend(segments(&batch).into_iter().map(|(tokens, _)| tokens));
        }
        assert_eq!(loader.epochs(), f64::from(epoch + 1));
        let mut sorted: Vec<char> = all.chars().collect();
        sorted.sort_unstable();
        let mut expected: Vec<char> = format!("^^^^{}", TEXTS.concat()).chars().collect();
        expected.sort_unstable();
        assert_eq!(sorted, expected);
        orders.push(all);
    }
    assert!(orders[0] != orders[1] && orders[1] != orders[2], "{orders:?}");
}

#[test]
fn a_packed_batch_may_span_epochs_and_hold_more_than_one() {
    // 3 windows of 13 an epoch, 7 a batch.
    let mut loader = loader(Mode::Packed, 13, 7);
    for _ in 0..5 {
        check(&loader.next_batch(), loader.shape());
    }
    assert_eq!(loader.cursor(), Cursor { epoch: 11, index: 2 });
}

#[test]
fn carried_lanes_continue_their_documents() {
    for (length, batch) in [(1, 1), (3, 2), (4, 3), (5, 8), (40, 1)] {
        let mut loader = loader(Mode::CarryState, length, batch);
        let steps = 40 / (length * batch);
        assert_eq!(loader.batches_per_epoch(), steps as f64);
        for _ in 0..2 {
            // What each lane has read, with `|` where it started from a zero state.
            let mut lanes = vec![String::new(); batch];
            for step in 0..steps {
                let batch = loader.next_batch();
                check(&batch, loader.shape());
                let texts = segments(&batch);
                let mut first = 0;
                for (lane, read) in lanes.iter_mut().enumerate() {
                    let last = batch.carry_out[lane].unwrap();
                    assert_eq!(batch.cu_seqlens[first] as usize, lane * length);
                    assert_eq!(batch.cu_seqlens[last + 1] as usize, (lane + 1) * length);
                    for (segment, (text, _)) in texts.iter().enumerate().take(last + 1).skip(first) {
                        match batch.carried[segment] {
                            Some(from) => assert!(from == lane && segment == first && step > 0),
                            None => read.push('|'),
                        }
                        read.push_str(text);
                    }
                    first = last + 1;
                }
                assert_eq!(first, batch.segments());
            }
            for read in &lanes {
                assert_eq!(read.chars().filter(|&c| c != '|').count(), steps * length);
                // After the lane's first piece, a zero state comes exactly where a document begins.
                for (index, piece) in read[1..].split('|').enumerate() {
                    assert_eq!(piece.matches('^').count(), usize::from(index > 0 || piece.starts_with('^')), "{read}");
                }
            }
        }
    }
}

#[test]
fn resumes_at_any_position_with_the_same_batches() {
    for mode in [Mode::Packed, Mode::CarryState] {
        let mut loader = loader(mode, 4, 3);
        let (mut cursors, mut batches) = (Vec::new(), Vec::new());
        for _ in 0..15 {
            cursors.push(loader.cursor());
            batches.push(loader.next_batch());
        }
        for (at, cursor) in cursors.into_iter().enumerate() {
            let json = serde_json::to_string(&cursor).unwrap();
            let mut resumed = self::loader(mode, 4, 3);
            resumed.seek(serde_json::from_str(&json).unwrap()).unwrap();
            for batch in &batches[at..] {
                assert_eq!(&resumed.next_batch(), batch);
            }
        }
    }
}

#[test]
fn the_seed_decides_the_order() {
    let first = |seed| {
        let shape = Shape { length: 5, batch: 8 };
        Loader::new(Arc::new(store(&TEXTS)), shape, Mode::Packed, seed).unwrap().next_batch()
    };
    assert_eq!(first(1), first(1));
    assert_ne!(first(1), first(2));
}

#[test]
fn refuses_impossible_shapes_and_positions() {
    let store = Arc::new(store(&TEXTS));
    let new = |length, batch, mode| Loader::new(store.clone(), Shape { length, batch }, mode, 0).map(|_| ());
    let message = |result: Result<(), DataError>| result.unwrap_err().to_string();
    assert!(message(new(0, 1, Mode::Packed)).contains("the length is 0"));
    assert!(message(new(1, 0, Mode::Packed)).contains("the batch is 0"));
    assert!(message(new(usize::MAX, 2, Mode::Packed)).contains("tokens"));
    assert!(message(new(41, 1, Mode::Packed)).contains("has 40 tokens, fewer than the 41 that one window of 41 needs"));
    assert!(message(new(8, 6, Mode::CarryState)).contains("fewer than the 48 that 6 lanes of 8 needs"));
    assert!(new(40, 1, Mode::Packed).is_ok() && new(8, 5, Mode::CarryState).is_ok());
    let mut loader = loader(Mode::Packed, 5, 2);
    assert!(message(loader.seek(Cursor { epoch: 0, index: 9 })).contains("the position 9 in epoch 0"));
    assert!(loader.seek(Cursor { epoch: 3, index: 8 }).is_ok());
}

#[test]
fn an_empty_store_is_too_short() {
    let empty = Arc::new(store(&[]));
    assert!(Loader::new(empty, Shape { length: 1, batch: 1 }, Mode::Packed, 0).is_err());
}

#[test]
fn shares_of_a_batch_are_its_windows() {
    for mode in [Mode::Packed, Mode::CarryState] {
        let mut loader = loader(mode, 3, 5);
        for _ in 0..2 {
            let batch = loader.next_batch();
            assert_eq!(batch.share(0..5, 3), batch);
            let parts = [0..2, 2..3, 3..5].map(|windows| (windows.clone(), batch.share(windows, 3)));
            let all: Vec<_> = parts.iter().flat_map(|(_, part)| segments(part)).collect();
            assert_eq!(all, segments(&batch));
            assert_eq!(parts.iter().map(|(_, part)| part.predicted()).sum::<usize>(), batch.predicted());
            for (windows, part) in parts {
                check(&part, Shape { length: 3, batch: windows.len() });
                assert_eq!(part.carry_out.len(), batch.carry_out.len());
                for (lane, segment) in part.carry_out.iter().enumerate() {
                    assert_eq!(segment.is_some(), windows.contains(&lane));
                    // A lane's last segment ends where its window does.
                    let end = segment.map(|s| part.cu_seqlens[s + 1] as usize);
                    assert!(end.is_none_or(|end| end == 3 * (lane - windows.start + 1)));
                }
                assert!(part.carried.iter().flatten().all(|lane| windows.contains(lane)));
            }
        }
    }
}
