//! Which documents are held out for validation.

use super::shuffle::Permutation;
use super::{DataError, Document};

/// Tells the split's permutation apart from those of the epochs.
const STREAM: u64 = u64::from_le_bytes(*b"split...");

/// How far past the wanted share one more document may lead, as a factor; it is left for training otherwise.
const OVERSHOOT: f64 = 1.25;

/// How far from the wanted place the end of a line is looked for when a single document is cut, in bytes.
const LINE_SEARCH: usize = 4096;

/// Documents to train on and documents held out.
#[derive(Debug, Clone, Default)]
pub struct Split {
    /// Documents to train on.
    pub training: Vec<Document>,
    /// Documents held out.
    pub validation: Vec<Document>,
    /// A sentence for the user where the split is not by document.
    pub warning: Option<String>,
}

/// Splits by document, so that no held-out text continues a training text.
///
/// `fraction` is the share of the bytes to hold out, in `[0, 1)`; 0 holds out nothing. Which documents these are is
/// a function of their order and the seed; both parts keep that order. With two or more documents each part has at
/// least one. A single document is cut into a first and a last part, with a warning.
///
/// # Errors
/// [`DataError::Fraction`] for a share outside `[0, 1)`, [`DataError::TooSmallToSplit`] for a single document of
/// one character.
pub fn split(documents: Vec<Document>, fraction: f64, seed: u64) -> Result<Split, DataError> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(DataError::Fraction(fraction));
    }
    if fraction == 0.0 || documents.is_empty() {
        return Ok(Split { training: documents, ..Split::default() });
    }
    if documents.len() == 1 {
        return cut(documents, fraction);
    }
    let held_out = choose(&documents, fraction, seed);
    let mut split = Split::default();
    for (document, held_out) in documents.into_iter().zip(held_out) {
        if held_out { split.validation.push(document) } else { split.training.push(document) }
    }
    Ok(split)
}

/// For each document, whether it is held out.
fn choose(documents: &[Document], fraction: f64, seed: u64) -> Vec<bool> {
    let total: u64 = documents.iter().map(|document| document.bytes.len() as u64).sum();
    let wanted = total as f64 * fraction;
    let mut held_out = vec![false; documents.len()];
    let (mut bytes, mut count) = (0u64, 0usize);
    let order: Vec<usize> =
        Permutation::new(documents.len() as u64, seed, 0, STREAM).iter().map(|index| index as usize).collect();
    for &index in &order {
        if bytes as f64 >= wanted || count + 1 == documents.len() {
            break;
        }
        let with = bytes + documents[index].bytes.len() as u64;
        if with as f64 <= wanted * OVERSHOOT {
            held_out[index] = true;
            (bytes, count) = (with, count + 1);
        }
    }
    if count == 0 {
        // Every document is larger than the share; the smallest one comes nearest to it.
        if let Some(&index) = order.iter().min_by_key(|&&index| documents[index].bytes.len()) {
            held_out[index] = true;
        }
    }
    held_out
}

/// Cuts the only document near the wanted place: after a line if one ends nearby, never inside a UTF-8 character.
fn cut(mut documents: Vec<Document>, fraction: f64) -> Result<Split, DataError> {
    let Some(mut document) = documents.pop() else {
        return Ok(Split::default());
    };
    let length = document.bytes.len();
    if length < 2 {
        return Err(DataError::TooSmallToSplit { document: document.name, bytes: length });
    }
    let wanted = ((length as f64 * (1.0 - fraction)).round() as usize).clamp(1, length - 1);
    let window = wanted.saturating_sub(LINE_SEARCH.min(length / 20))..wanted;
    let line = document.bytes[window.clone()].iter().rposition(|&b| b == b'\n').map(|at| window.start + at + 1);
    let is_boundary = |at: &usize| document.bytes[*at] & 0xc0 != 0x80;
    let place = line
        .or_else(|| (1..=wanted).rev().take(4).find(is_boundary))
        .or_else(|| (wanted..length).take(4).find(is_boundary))
        // Four bytes that all continue a character: this is not UTF-8, so no place is worse than another.
        .or((length > 4).then_some(wanted));
    let Some(place) = place.filter(|&at| at > 0 && at < length) else {
        return Err(DataError::TooSmallToSplit { document: document.name, bytes: length });
    };
    let tail = document.bytes.split_off(place);
    let warning = format!(
        "there is only one document, {}, so its last {} of {length} bytes are held out; \
         with several documents whole ones are",
        document.name,
        tail.len()
    );
    let held_out = Document { name: format!("{} (from byte {place})", document.name), bytes: tail };
    Ok(Split { training: vec![document], validation: vec![held_out], warning: Some(warning) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(sizes: &[usize]) -> Vec<Document> {
        let name = |index| format!("document {index}");
        sizes.iter().enumerate().map(|(i, &size)| Document { name: name(i), bytes: vec![b'a'; size] }).collect()
    }

    fn one(text: &str) -> Vec<Document> {
        vec![Document { name: "only".into(), bytes: text.into() }]
    }

    fn names(documents: &[Document]) -> Vec<&str> {
        documents.iter().map(|d| d.name.as_str()).collect()
    }

    #[test]
    fn is_a_function_of_the_seed_and_keeps_the_order() {
        let sizes: Vec<usize> = (0..200).map(|i| 50 + (i * 37) % 100).collect();
        let first = split(documents(&sizes), 0.1, 5).unwrap();
        let again = split(documents(&sizes), 0.1, 5).unwrap();
        let other = split(documents(&sizes), 0.1, 6).unwrap();
        assert_eq!(names(&first.validation), names(&again.validation));
        assert_ne!(names(&first.validation), names(&other.validation));
        assert_eq!(first.training.len() + first.validation.len(), 200);
        assert!(first.validation.iter().all(|d| !first.training.contains(d)));
        let bytes = |d: &[Document]| d.iter().map(|d| d.bytes.len()).sum::<usize>() as f64;
        let share = bytes(&first.validation) / sizes.iter().sum::<usize>() as f64;
        assert!((0.1..0.125).contains(&share), "{share}");
        let number = |d: &Document| d.name["document ".len()..].parse::<usize>().unwrap();
        assert!(first.validation.is_sorted_by_key(number) && first.training.is_sorted_by_key(number));
        assert!(first.warning.is_none());
    }

    #[test]
    fn each_part_has_a_document() {
        for seed in 0..20 {
            for fraction in [0.001, 0.5, 0.999] {
                for sizes in [&[1, 1][..], &[1000, 10], &[5, 5, 5, 500]] {
                    let split = split(documents(sizes), fraction, seed).unwrap();
                    assert!(!split.training.is_empty() && !split.validation.is_empty(), "{sizes:?} {fraction}");
                }
            }
        }
        let split = split(documents(&[1000, 10]), 0.01, 0).unwrap();
        assert_eq!(split.validation[0].bytes.len(), 10);
    }

    #[test]
    fn nothing_is_held_out_with_a_share_of_zero() {
        let split = split(documents(&[10, 20]), 0.0, 0).unwrap();
        assert_eq!((split.training.len(), split.validation.len()), (2, 0));
    }

    #[test]
    fn one_document_is_cut_after_a_line_with_a_warning() {
        let text = "a line of text\n".repeat(100);
        let split = split(one(&text), 0.1, 9).unwrap();
        assert!(split.warning.unwrap().contains("only one document, only"));
        assert_eq!(split.training[0].bytes.len() % 15, 0);
        assert_eq!(split.training[0].bytes.len() + split.validation[0].bytes.len(), text.len());
        assert!((100..=250).contains(&split.validation[0].bytes.len()));
    }

    #[test]
    fn one_document_is_never_cut_inside_a_character() {
        for length in 2..40 {
            for fraction in [0.01, 0.3, 0.5, 0.99] {
                let split = split(one(&"蛇é🐍".repeat(40)[..]), fraction, 0).unwrap();
                assert!(std::str::from_utf8(&split.training[0].bytes).is_ok());
                let text: String = "é".repeat(length);
                let split = super::split(one(&text), fraction, 0).unwrap();
                assert!(std::str::from_utf8(&split.validation[0].bytes).is_ok());
                assert!(!split.training[0].bytes.is_empty() && !split.validation[0].bytes.is_empty());
            }
        }
    }

    #[test]
    fn refuses_what_cannot_be_split() {
        assert!(matches!(split(one("x"), 0.5, 0), Err(DataError::TooSmallToSplit { .. })));
        assert!(matches!(split(one("é"), 0.5, 0), Err(DataError::TooSmallToSplit { .. })));
        for fraction in [-0.1, 1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(split(documents(&[1, 1]), fraction, 0), Err(DataError::Fraction(_))));
        }
    }
}
