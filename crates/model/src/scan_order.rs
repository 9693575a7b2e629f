//! Orders in which the cells of a grid become a sequence: permutations with exact inverses, one gather before a scan and
//! its inverse behind it ([`hognose_core::ops::permute_rows`]).
//!
//! A grid has two or three axes, (h, w) or (t, h, w); cells are numbered with the last axis fastest. An order's text is
//! its name and the grid, such as `snake3-14x14`, `columns-reversed-8x8` or `hilbert-4x8x8`; the names:
//!
//! | name | order | source |
//! |---|---|---|
//! | `rows` | the last axis fastest; of three axes, frame after frame ("spatial first") | Vim, VideoMamba (arXiv 2401.09417, 2403.06977) |
//! | `columns` | the first axis fastest; of three axes, all times of a place ("temporal first") | VMamba, VideoMamba (arXiv 2401.10166) |
//! | `snake0` … `snake7` | every second line backwards, so neighbours in the sequence are neighbours in the grid; bit 0 takes columns for rows, bits 1 and 2 start at the other end of the first and of the last axis | PlainMamba, ZigMa (arXiv 2403.17695, 2403.13802) |
//! | `zigma` | `snake` of the layer's number modulo 8 | ZigMa |
//! | `nd` | lines along h, then w, then t, each forwards and then backwards, one a layer | Mamba-ND (arXiv 2402.05892) |
//! | `windowK` | windows of K cells an axis, row by row, and so inside them | LocalMamba (arXiv 2403.09338) |
//! | `strideK` | the subsets of cells whose places have the same rests by K, each of them row by row | EfficientVMamba (arXiv 2403.09977) |
//! | `hilbert` | along the Hilbert curve of the smallest power of two that holds the grid | PointMamba (arXiv 2402.10739) |
//! | `hilbertT` | the same with the axes in the opposite order | PointMamba |
//!
//! `-reversed` behind a name runs the order backwards. The nodes of a graph by ascending degree (Graph-Mamba, arXiv
//! 2402.00789) are [`Permutation::ascending`] of their degrees.

use std::fmt;
use std::str::FromStr;

/// Cells of a grid that are taken for real: their numbers are i32 on devices.
const MAX_CELLS: usize = i32::MAX as usize;

/// Why an order is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the scan order \"{text}\" {reason}")]
pub struct ScanOrderError {
    /// The order.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A bijection of 0 .. n with its inverse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permutation {
    forward: Vec<u32>,
    inverse: Vec<u32>,
}

impl Permutation {
    /// The permutation that puts element `forward[i]` in place i; `None` where that is none.
    pub fn new(forward: Vec<u32>) -> Option<Permutation> {
        let mut inverse = vec![u32::MAX; forward.len()];
        for (place, &element) in forward.iter().enumerate() {
            let slot = inverse.get_mut(element as usize).filter(|slot| **slot == u32::MAX)?;
            *slot = u32::try_from(place).ok()?;
        }
        Some(Permutation { forward, inverse })
    }

    /// The elements by ascending key; those with equal keys keep their order.
    pub fn ascending<K: Ord>(keys: &[K]) -> Permutation {
        let mut forward: Vec<u32> = (0..keys.len() as u32).collect();
        forward.sort_by_key(|&i| &keys[i as usize]);
        Permutation::of(forward)
    }

    /// Of numbers that are known to be each there once.
    fn of(forward: Vec<u32>) -> Permutation {
        let mut inverse = vec![0; forward.len()];
        forward.iter().zip(0..).for_each(|(&element, place)| inverse[element as usize] = place);
        Permutation { forward, inverse }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.forward.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.forward.is_empty()
    }

    /// The element in each place: `y[i] = x[forward[i]]` puts x in order.
    pub fn forward(&self) -> &[u32] {
        &self.forward
    }

    /// The place of each element: `x[i] = y[inverse[i]]` undoes that.
    pub fn inverse(&self) -> &[u32] {
        &self.inverse
    }

    /// The inverse as a permutation.
    pub fn inverted(self) -> Permutation {
        Permutation { forward: self.inverse, inverse: self.forward }
    }

    /// The same order, last element first.
    pub fn reversed(self) -> Permutation {
        Permutation::of(self.forward.into_iter().rev().collect())
    }
}

/// An order of the cells of a grid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanOrder {
    curve: Curve,
    reversed: bool,
    grid: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Curve {
    Rows,
    Columns,
    Snake(usize),
    ZigMa,
    Nd,
    Window(usize),
    Stride(usize),
    Hilbert { transposed: bool },
}

/// Curves without a number behind their names.
const PLAIN: [(&str, Curve); 6] = [
    ("rows", Curve::Rows),
    ("columns", Curve::Columns),
    ("zigma", Curve::ZigMa),
    ("nd", Curve::Nd),
    ("hilbert", Curve::Hilbert { transposed: false }),
    ("hilbertT", Curve::Hilbert { transposed: true }),
];
const KNOWN: &str = "rows, columns, snake0 to snake7, zigma, nd, windowK, strideK, hilbert, hilbertT";

impl FromStr for ScanOrder {
    type Err = ScanOrderError;

    fn from_str(text: &str) -> Result<ScanOrder, ScanOrderError> {
        let fail = |reason: String| ScanOrderError { text: text.to_string(), reason };
        let form = || fail("has another form than NAME-HxW, NAME-reversed-HxW or NAME-TxHxW".into());
        let (name, grid) = text.rsplit_once('-').ok_or_else(form)?;
        let (name, reversed) = name.strip_suffix("-reversed").map_or((name, false), |name| (name, true));
        let grid: Option<Vec<usize>> = grid.split('x').map(|n| n.parse().ok()).collect();
        let grid = grid.filter(|g| matches!(g.len(), 2 | 3)).ok_or_else(form)?;
        let cells = grid.iter().try_fold(1usize, |all, &n| all.checked_mul(n));
        if cells.is_none_or(|n| n == 0 || n > MAX_CELLS) {
            return Err(fail(format!("has a grid without cells or with more than {MAX_CELLS}")));
        }
        let plain = PLAIN.iter().find(|(known, _)| *known == name).map(|(_, curve)| *curve);
        let numbered = || {
            let digits = name.find(|c: char| c.is_ascii_digit())?;
            let number: usize = name[digits..].parse().ok()?;
            match &name[..digits] {
                "snake" if number < 8 => Some(Curve::Snake(number)),
                "window" if number > 0 => Some(Curve::Window(number)),
                "stride" if number > 0 => Some(Curve::Stride(number)),
                _ => None,
            }
        };
        let curve = plain.or_else(numbered).ok_or_else(|| fail(format!("has an unknown name; known are {KNOWN}")))?;
        Ok(ScanOrder { curve, reversed, grid })
    }
}

impl fmt::Display for ScanOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.curve {
            Curve::Snake(n) => write!(f, "snake{n}")?,
            Curve::Window(n) => write!(f, "window{n}")?,
            Curve::Stride(n) => write!(f, "stride{n}")?,
            plain => f.write_str(PLAIN.iter().find(|(_, curve)| *curve == plain).map_or("", |(name, _)| name))?,
        }
        let grid: Vec<String> = self.grid.iter().map(usize::to_string).collect();
        write!(f, "{}-{}", if self.reversed { "-reversed" } else { "" }, grid.join("x"))
    }
}

impl ScanOrder {
    /// Cells of the grid.
    pub fn cells(&self) -> usize {
        self.grid.iter().product()
    }

    /// The order of the cells in layer `layer`, on whose number only `zigma` and `nd` depend.
    pub fn permutation(&self, layer: usize) -> Permutation {
        let grid = &self.grid;
        let axes = grid.len();
        let found = match self.curve {
            Curve::Rows => sweep(grid, &self.axes(false), &[false; 3], false),
            Curve::Columns => sweep(grid, &self.axes(true), &[false; 3], false),
            Curve::Snake(n) => self.snake(n),
            Curve::ZigMa => self.snake(layer % 8),
            Curve::Nd => {
                // Of three axes the first is time, which comes last.
                let along = (layer / 2 + axes - 2) % axes;
                let order: Vec<usize> = (0..axes).filter(|&axis| axis != along).chain([along]).collect();
                let found = sweep(grid, &order, &[false; 3], false);
                if layer.is_multiple_of(2) { found } else { found.reversed() }
            }
            // The window, then the place inside of it; the rests, then what they are rests of.
            Curve::Window(k) => self.by_key(|place| [place.map(|x| x / k), place.map(|x| x % k)]),
            Curve::Stride(k) => self.by_key(|place| [place.map(|x| x % k), place.map(|x| x / k)]),
            Curve::Hilbert { transposed } => {
                let side = grid.iter().copied().max().unwrap_or(1);
                let bits = side.next_power_of_two().trailing_zeros().max(1);
                self.by_key(|mut place| {
                    let place = &mut place[..axes];
                    if transposed {
                        place.reverse();
                    }
                    hilbert(place, bits)
                })
            }
        };
        if self.reversed { found.reversed() } else { found }
    }

    /// The axes, slowest first; with columns what is outermost becomes innermost.
    fn axes(&self, columns: bool) -> Vec<usize> {
        let mut axes: Vec<usize> = (0..self.grid.len()).collect();
        axes.rotate_left(usize::from(columns));
        axes
    }

    fn snake(&self, n: usize) -> Permutation {
        let mut from_end = [false; 3];
        (from_end[0], from_end[self.grid.len() - 1]) = (n & 2 != 0, n & 4 != 0);
        sweep(&self.grid, &self.axes(n & 1 != 0), &from_end, true)
    }

    /// The cells by ascending key of their places; of two axes the third is 0.
    fn by_key<K: Ord>(&self, key: impl Fn([usize; 3]) -> K) -> Permutation {
        let keys: Vec<K> = (0..self.cells())
            .map(|cell| {
                let mut place = [0; 3];
                let mut rest = cell;
                for (x, &n) in place.iter_mut().zip(&self.grid).rev() {
                    (*x, rest) = (rest % n, rest / n);
                }
                key(place)
            })
            .collect();
        Permutation::ascending(&keys)
    }
}

/// Lines along the last of `axes` (slowest first), from the far end of an axis where `from_end` says so; a snake turns
/// around at the end of each line instead of going back: the reflected Gray code of mixed radix.
fn sweep(grid: &[usize], axes: &[usize], from_end: &[bool], snake: bool) -> Permutation {
    let cells: usize = grid.iter().product();
    let stride = |axis: usize| grid[axis + 1..].iter().product::<usize>();
    let cell = |step: usize| {
        let (mut rest, mut cell) = (step, 0);
        for &axis in axes.iter().rev() {
            let n = grid[axis];
            // How many lines along this axis are behind us.
            let (x, lines) = (rest % n, rest / n);
            let backwards = from_end[axis] != (snake && lines % 2 == 1);
            cell += stride(axis) * if backwards { n - 1 - x } else { x };
            rest = lines;
        }
        cell as u32
    };
    Permutation::of((0..cells).map(cell).collect())
}

/// How far along the Hilbert curve of 2^bits cells an axis a place lies (Skilling, Programming the Hilbert curve, AIP
/// Conference Proceedings 707, 2004).
fn hilbert(x: &mut [usize], bits: u32) -> u128 {
    let axes = x.len();
    for bit in (1..bits).rev() {
        let low = (1 << bit) - 1;
        for i in 0..axes {
            if x[i] >> bit & 1 == 1 {
                x[0] ^= low;
            } else {
                let swapped = (x[0] ^ x[i]) & low;
                (x[0], x[i]) = (x[0] ^ swapped, x[i] ^ swapped);
            }
        }
    }
    for i in 1..axes {
        x[i] ^= x[i - 1];
    }
    let mut flips = 0;
    for bit in (1..bits).rev() {
        if x[axes - 1] >> bit & 1 == 1 {
            flips ^= (1 << bit) - 1;
        }
    }
    let digits = (0..bits).rev().flat_map(|bit| x.iter().map(move |x| (x ^ flips) >> bit & 1));
    digits.fold(0, |all, bit| all << 1 | bit as u128)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(text: &str) -> Permutation {
        text.parse::<ScanOrder>().unwrap().permutation(0)
    }

    /// Steps in the grid between neighbours in the sequence: the largest.
    fn largest_step(text: &str) -> usize {
        let scan: ScanOrder = text.parse().unwrap();
        let place = |cell: u32| {
            let (mut rest, mut place) = (cell as usize, Vec::new());
            for &n in scan.grid.iter().rev() {
                place.push(rest % n);
                rest /= n;
            }
            place
        };
        let step = |w: &[u32]| place(w[0]).iter().zip(place(w[1])).map(|(a, b)| a.abs_diff(b)).sum();
        scan.permutation(0).forward.windows(2).map(step).max().unwrap_or(0)
    }

    #[test]
    fn every_order_has_an_exact_inverse() {
        let names = PLAIN.iter().map(|(name, _)| name.to_string());
        let names = names.chain((0..8).map(|n| format!("snake{n}")));
        let names = names.chain((1..5).flat_map(|k| [format!("window{k}"), format!("stride{k}")]));
        for name in names {
            for grid in ["1x1", "1x7", "7x1", "4x4", "3x5", "5x8", "2x3x4", "4x4x4", "1x1x9", "5x1x2"] {
                for reversed in ["", "-reversed"] {
                    let text = format!("{name}{reversed}-{grid}");
                    let scan: ScanOrder = text.parse().unwrap();
                    assert_eq!(scan.to_string(), text);
                    for layer in 0..9 {
                        let p = scan.permutation(layer);
                        assert_eq!(p.len(), scan.cells());
                        assert_eq!(Permutation::new(p.forward.clone()).as_ref(), Some(&p), "{text}");
                        assert!((0..p.len()).all(|i| p.inverse()[p.forward()[i] as usize] as usize == i), "{text}");
                        assert_eq!(p.clone().inverted().inverted(), p);
                    }
                }
            }
        }
    }

    #[test]
    fn known_orders() {
        assert_eq!(order("rows-2x3").forward(), [0, 1, 2, 3, 4, 5]);
        assert_eq!(order("rows-reversed-2x3").forward(), [5, 4, 3, 2, 1, 0]);
        assert_eq!(order("columns-2x3").forward(), [0, 3, 1, 4, 2, 5]);
        assert_eq!(order("snake0-2x3").forward(), [0, 1, 2, 5, 4, 3]);
        assert_eq!(order("snake1-2x3").forward(), [0, 3, 4, 1, 2, 5]);
        assert_eq!(order("snake2-2x3").forward(), [3, 4, 5, 2, 1, 0]);
        assert_eq!(order("snake4-2x3").forward(), [2, 1, 0, 3, 4, 5]);
        assert_eq!(order("window2-2x4").forward(), [0, 1, 4, 5, 2, 3, 6, 7]);
        assert_eq!(order("window2-3x3").forward(), [0, 1, 3, 4, 2, 5, 6, 7, 8]);
        assert_eq!(order("stride2-3x3").forward(), [0, 2, 6, 8, 1, 7, 3, 5, 4]);
        // All times of a place, then the next place.
        assert_eq!(order("columns-2x1x3").forward(), [0, 3, 1, 4, 2, 5]);
        assert_eq!(Permutation::ascending(&[2, 1, 3, 1]).forward(), [1, 3, 0, 2]);
    }

    #[test]
    fn layers_alternate() {
        let of = |text: &str, layer| text.parse::<ScanOrder>().unwrap().permutation(layer);
        for layer in 0..16 {
            assert_eq!(of("zigma-3x4", layer), order(&format!("snake{}-3x4", layer % 8)));
        }
        // Along h, along w, each in both directions.
        let expected = ["columns", "columns-reversed", "rows", "rows-reversed", "columns"];
        for (layer, name) in expected.iter().enumerate() {
            assert_eq!(of("nd-3x4", layer), order(&format!("{name}-3x4")));
        }
        assert_eq!(of("nd-2x2x2", 0).forward(), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(of("nd-2x2x2", 2).forward(), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(of("nd-2x2x2", 4), order("columns-2x2x2"));
        assert_eq!(of("nd-2x2x2", 6), of("nd-2x2x2", 0));
    }

    #[test]
    fn snakes_and_hilbert_curves_never_jump() {
        for n in 0..8 {
            for grid in ["2x2", "5x4", "4x5", "1x6", "3x4x5", "2x3x2"] {
                assert_eq!(largest_step(&format!("snake{n}-{grid}")), 1, "snake{n}-{grid}");
            }
        }
        for grid in ["2x2", "4x4", "8x8", "16x16", "2x2x2", "4x4x4", "8x8x8"] {
            assert_eq!(largest_step(&format!("hilbert-{grid}")), 1, "hilbert-{grid}");
            assert_eq!(largest_step(&format!("hilbertT-{grid}")), 1, "hilbertT-{grid}");
        }
        assert!(largest_step("rows-5x4") > 1);
    }

    #[test]
    fn the_transposed_hilbert_curve_swaps_the_axes() {
        let (plain, transposed) = (order("hilbert-8x8"), order("hilbertT-8x8"));
        let swapped: Vec<u32> = plain.forward().iter().map(|cell| cell % 8 * 8 + cell / 8).collect();
        assert_eq!(transposed.forward(), swapped);
        assert_ne!(plain, transposed);
        // Every aligned block of a power of two is walked through without leaving it.
        for (side, all) in [(2, order("hilbert-8x8")), (4, plain)] {
            for block in all.forward().chunks(side * side) {
                let of = |cell: &u32| (*cell as usize / 8 / side, *cell as usize % 8 / side);
                assert!(block.iter().all(|cell| of(cell) == of(&block[0])));
            }
        }
    }

    #[test]
    fn bad_orders_are_named() {
        for (text, part) in [
            ("rows", "another form"),
            ("rows-4", "another form"),
            ("rows-4x4x4x4", "another form"),
            ("rows-4xa", "another form"),
            ("rows-0x4", "without cells"),
            ("rows-99999999999x99999999999", "without cells"),
            ("spiral-4x4", "known are rows"),
            ("snake8-4x4", "known are rows"),
            ("window0-4x4", "known are rows"),
            ("window-4x4", "known are rows"),
        ] {
            let error = text.parse::<ScanOrder>().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(Permutation::new(vec![0, 0]), None);
        assert_eq!(Permutation::new(vec![0, 2]), None);
    }
}
