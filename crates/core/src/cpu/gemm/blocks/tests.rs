use super::*;
use crate::cpu::Cpu;
use crate::cpu::gemm::{Rhs, gemm};
use crate::rng;

fn cpu(isa: Isa, threads: usize) -> Cpu {
    Cpu { pool: Pool::new(threads), isa }
}

/// Numbers in −1..1.
fn numbers(len: usize, seed: u32) -> Vec<f32> {
    (0..len as u64).map(|i| 2.0 * rng::uniform(seed, i) - 1.0).collect()
}

/// W in blocks of any bits, as in a file, but for scales of a moderate size.
fn any_blocks(dtype: DType, n: usize, k: usize, seed: u32) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        (0..n * dtype.row_bytes(k)).map(|i| (rng::uniform(seed, i as u64) * 256.0) as u8).collect();
    let kind = dtype.blocks().unwrap();
    for (i, block) in bytes.chunks_exact_mut(kind.block_bytes()).enumerate() {
        let scale = half::f16::from_f32(0.01 * (i % 7) as f32 - 0.02).to_le_bytes();
        match dtype {
            DType::Q6_K => block[208..].copy_from_slice(&scale),
            DType::Q4_K => [block[0], block[1], block[2], block[3]] = [scale[0], scale[1], scale[1], scale[0] & 0x3f],
            _ => block[..2].copy_from_slice(&scale),
        }
    }
    bytes
}

/// What the module says of rounding, in f64.
fn rounded(row: &[f32]) -> Vec<f64> {
    let group = |x: &[f32]| {
        let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let (scale, inverse) = if largest < LEAST { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) };
        let round = |x: &f32| f64::from((x * inverse).round_ties_even()) * f64::from(scale);
        x.iter().map(round).collect::<Vec<f64>>()
    };
    row.chunks(GROUP).flat_map(group).collect()
}

/// The minimum of each number's part.
fn minima(dtype: DType, row: &[u8], k: usize) -> Vec<f64> {
    let mut minima = vec![0.0; k.next_multiple_of(256)];
    if dtype == DType::Q4_K {
        for (block, minima) in row.as_chunks().0.iter().zip(minima.chunks_mut(256)) {
            let e = f64::from(half::f16::from_le_bytes([block[2], block[3]]).to_f32());
            for (part, minima) in minima.chunks_mut(32).enumerate() {
                minima.fill((e * f64::from(quant::part_of_q4_k(block, part).1)).abs());
            }
        }
    }
    minima
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// One and more rows than a tile, a task's and odd numbers of them; panels that are not full; blocks that are not.
const SHAPES: [(DType, usize, usize, usize); 9] = [
    (DType::Q8_0, 1, 37, 31),
    (DType::Q8_0, 7, 16, 32),
    (DType::Q8_0, 15, 70, 1100),
    (DType::Q4_K, 3, 33, 768),
    (DType::Q4_K, 13, 15, 300),
    (DType::Q6_K, 400, 5, 256),
    (DType::Q6_K, 6, 18, 513),
    (DType::Q4_K, 0, 3, 256),
    (DType::Q8_0, 2, 3, 0),
];

#[test]
fn products_with_blocks_are_within_the_stated_bound_whatever_the_rows_and_threads() {
    for (seed, (dtype, m, n, k)) in (1..).zip(SHAPES) {
        let rows = any_blocks(dtype, n, k, seed);
        let row_bytes = dtype.row_bytes(k);
        let mut panels = vec![0xA5; blocks_len(dtype, k, n)];
        arrange_blocks(&Pool::new(2), dtype, &rows, (n, k), &mut panels);
        let matrix = BlockMatrix::new(dtype, k, n, &panels);
        let mut w = vec![0.0; n * k];
        for (j, row) in w.chunks_exact_mut(k.max(1)).enumerate() {
            dtype.blocks().unwrap().decode(&rows[j * row_bytes..][..row_bytes], row);
            let mut column = vec![f32::NAN; k];
            matrix.column(j, &mut column);
            assert_eq!(bits(&column), bits(row), "{dtype}, row {j}");
        }
        // The last row holds the largest products that there are.
        let mut a = numbers(m * k, seed + 100);
        a.iter_mut().rev().take(k.min(m * k)).enumerate().for_each(|(i, a)| *a = if i % 64 < 32 { 2.0 } else { -2.0 });
        let (c, bias) = (numbers(m * n, seed + 200), numbers(n, seed + 300));
        let run = |isa, threads, start, a: MatRef<'_>, c: &[f32]| {
            let mut c = c.to_vec();
            gemm(&cpu(isa, threads), MatMut::new(&mut c, a.rows(), n), start, a, Rhs::Blocks(matrix));
            c
        };
        let view = MatRef::new(&a, m, k);
        for isa in Isa::available() {
            for start in [Start::Zero, Start::Bias(&bias), Start::C] {
                let got = run(isa, 1, start, view, &c);
                assert_eq!(bits(&run(isa, 3, start, view, &c)), bits(&got), "{dtype}, {isa}: threads");
                for first in (0..m).step_by(5) {
                    let some = first..m.min(first + 1 + first % 7);
                    let part = run(isa, 2, start, view.row_range(some.clone()), &c[some.start * n..some.end * n]);
                    assert_eq!(bits(&part), bits(&got[some.start * n..some.end * n]), "{dtype}, {isa}: rows {some:?}");
                }
                let transposed: Vec<f32> = (0..k * m).map(|i| a[i % m * k + i / m]).collect();
                let turned = run(isa, 1, start, MatRef::new(&transposed, k, m).t(), &c);
                assert_eq!(bits(&turned), bits(&got), "{dtype}, {isa}: strides");
                let roundings = if isa == Isa::Portable { 2.0 } else { 1.0 };
                for j in 0..n {
                    let minima = minima(dtype, &rows[j * row_bytes..][..row_bytes], k);
                    for i in 0..m {
                        let first = match start {
                            Start::Zero => 0.0,
                            Start::Bias(bias) => f64::from(bias[j]),
                            Start::C => f64::from(c[i * n + j]),
                        };
                        let (mut sum, mut size) = (first, first.abs());
                        for (l, a) in rounded(&a[i * k..][..k]).into_iter().enumerate() {
                            let w = f64::from(w[j * k + l]);
                            sum += a * w;
                            size += a.abs() * (w.abs() + 2.0 * minima[l]);
                        }
                        let bound = roundings * (k as f64 / 32.0 + 3.0) * 2f64.powi(-24) * size;
                        let error = (f64::from(got[i * n + j]) - sum).abs();
                        assert!(
                            error <= bound,
                            "{dtype} {m} × {n} × {k}, {isa}: ({i}, {j}) is off by {error}, {bound}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn encoded_rows_lie_as_those_of_a_file() {
    for (dtype, n, k) in [(DType::Q8_0, 21, 50), (DType::Q4_K, 17, 512), (DType::Q6_K, 16, 256)] {
        let w = numbers(n * k, 7);
        let mut rows = vec![0; n * dtype.row_bytes(k)];
        for (row, blocks) in w.chunks_exact(k).zip(rows.chunks_exact_mut(dtype.row_bytes(k))) {
            quant::encode(dtype, row, blocks);
        }
        let pool = Pool::new(3);
        let (mut arranged, mut encoded) = (vec![1; blocks_len(dtype, k, n)], vec![2; blocks_len(dtype, k, n)]);
        arrange_blocks(&pool, dtype, &rows, (n, k), &mut arranged);
        encode_blocks(&pool, dtype, &w, (n, k), &mut encoded);
        assert!(arranged == encoded, "{dtype}");
    }
}

/// Rounds one row.
fn round(isa: Isa, row: &[f32]) -> Vec<Rounded> {
    let groups = row.len().div_ceil(GROUP);
    let mut to = vec![Rounded { q: [99; GROUP], sums: [99; 2], scale: 99.0 }; groups];
    isa.run(RoundRows { a: MatRef::new(row, 1, row.len()), groups, to: to.as_mut_ptr() });
    to
}

#[test]
fn rounding_is_the_same_at_all_levels_and_within_its_bound() {
    let mut row = numbers(32 * 40 + 13, 3);
    row.iter_mut().enumerate().for_each(|(i, x)| *x *= 10f32.powi(i as i32 / 32 - 36));
    for isa in Isa::available() {
        for (group, x) in round(isa, &row).iter().zip(row.chunks(GROUP)) {
            let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let bound = f64::from(largest.max(LEAST * if largest < LEAST { 254.0 } else { 0.0 })) / 254.0 * 1.000_001;
            for ((q, x), expected) in group.q.iter().zip(x).zip(rounded(x)) {
                let value = f64::from(*q) * f64::from(group.scale);
                assert_eq!(value, expected, "{isa}");
                assert!((value - f64::from(*x)).abs() <= bound, "{isa}: {x} became {value}");
            }
            let sum: i32 = group.q.iter().map(|&q| i32::from(q)).sum();
            assert_eq!(group.sums[0] + group.sums[1], sum);
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    for isa in Isa::available() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            let (k, n) = (96, 3);
            let mut panels = vec![0; blocks_len(DType::Q8_0, k, n)];
            let w = numbers(n * k, 4);
            encode_blocks(&Pool::new(1), DType::Q8_0, &w, (n, k), &mut panels);
            let (mut a, mut c) = (numbers(2 * k, 5), vec![0.0; 2 * n]);
            a[40] = bad;
            let b = Rhs::Blocks(BlockMatrix::new(DType::Q8_0, k, n, &panels));
            gemm(&cpu(isa, 1), MatMut::new(&mut c, 2, n), Start::Zero, MatRef::new(&a, 2, k), b);
            assert!(c[..n].iter().all(|c| !c.is_finite()) && c[n..].iter().all(|c| c.is_finite()), "{isa}: {c:?}");
        }
    }
}
