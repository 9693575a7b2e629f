use super::*;
use crate::rng;

/// Normally distributed numbers.
fn normal(len: usize, seed: u32) -> Vec<f32> {
    (0..len as u64)
        .map(|i| {
            let (u, v) = (rng::uniform(seed, 2 * i), rng::uniform(seed, 2 * i + 1));
            (-2.0 * (1.0 - u).ln()).sqrt() * (std::f32::consts::TAU * v).cos()
        })
        .collect()
}

fn round_trip(dtype: DType, row: &[f32]) -> Vec<f32> {
    let mut blocks = vec![0xFF; dtype.row_bytes(row.len())];
    encode(dtype, row, &mut blocks);
    let mut out = vec![f32::NAN; row.len()];
    dtype.blocks().unwrap().decode(&blocks, &mut out);
    out
}

fn rms(values: impl Iterator<Item = f32>) -> f32 {
    let (sum, n) = values.fold((0.0, 0), |(s, n), v| (s + f64::from(v * v), n + 1));
    (sum / f64::from(n.max(1))).sqrt() as f32
}

fn from_hex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .as_chunks::<2>()
        .0
        .iter()
        .map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap())
        .collect()
}

/// Random blocks and what the Python package gguf (`gguf.quants.dequantize`) makes of them: kind, bytes, f32.
#[test]
fn blocks_decode_as_in_the_python_package() {
    use Kind::*;
    let kinds = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K];
    for (kind, line) in kinds.iter().zip(include_str!("vectors.txt").lines()) {
        let [name, block, values] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("three words a line") };
        assert_eq!(name, format!("{kind:?}"));
        let (block, values) = (from_hex(block), from_hex(values));
        assert_eq!((block.len(), values.len()), (kind.block_bytes(), 4 * kind.block_len()));
        let expected: Vec<u32> = values.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let mut out = vec![f32::NAN; kind.block_len()];
        kind.decode(&block, &mut out);
        assert_eq!(out.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), expected, "{name}");
        // The beginning of a block.
        let mut out = vec![f32::NAN; 5];
        kind.decode(&block, &mut out);
        assert_eq!(out.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), expected[..5], "{name}");
    }
}

#[test]
fn errors_stay_within_their_bounds() {
    for (dtype, bound) in [(DType::Q8_0, Q8_0_RMS), (DType::Q6_K, Q6_K_RMS), (DType::Q4_K, Q4_K_RMS)] {
        let row = normal(64 * 256, 1);
        for scale in [1.0, 1e-3, 300.0] {
            let row: Vec<f32> = row.iter().map(|v| v * scale).collect();
            let out = round_trip(dtype, &row);
            let error = rms(row.iter().zip(&out).map(|(a, b)| a - b)) / rms(row.iter().copied());
            assert!(error < bound && error > bound / 2.0, "{dtype}: {error} with scale {scale}");
        }
    }
    let row = normal(4096, 2);
    for (x, y) in row.chunks(32).zip(round_trip(DType::Q8_0, &row).chunks(32)) {
        let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(x.iter().zip(y).all(|(x, y)| (x - y).abs() <= Q8_0_ERROR * largest));
    }
}

#[test]
fn numbers_that_the_blocks_hold_come_back_exactly() {
    let d = 0.25;
    let row: Vec<f32> = (0..512).map(|i| d * if i % 32 == 0 { 127.0 } else { (i * 7 % 255) as f32 - 127.0 }).collect();
    assert_eq!(round_trip(DType::Q8_0, &row), row);
    // 63 · 15 steps of the scale in one part, minima that are whole, all values of q.
    let row: Vec<f32> = (0..256).map(|i| d * (63.0 * (i % 16) as f32 - 63.0 * (i / 32 % 4) as f32)).collect();
    let out = round_trip(DType::Q4_K, &row);
    assert!(row.iter().zip(&out).all(|(a, b)| (a - b).abs() < 1e-2 * 15.0 * d), "{out:?}");
    let row: Vec<f32> = (0..256).map(|i| d * ((i / 16) as f32 - 8.0) * ((i * 5 % 64) as f32 - 32.0)).collect();
    let out = round_trip(DType::Q6_K, &row);
    assert!(row.iter().zip(&out).all(|(a, b)| (a - b).abs() < 1.0), "{out:?}");
}

#[test]
fn odd_rows_and_odd_values() {
    for len in [0, 1, 31, 33, 48] {
        let row = normal(len, 3);
        let out = round_trip(DType::Q8_0, &row);
        assert!(row.iter().zip(&out).all(|(a, b)| (a - b).abs() < 0.02));
    }
    for dtype in [DType::Q8_0, DType::Q4_K, DType::Q6_K] {
        assert_eq!(round_trip(dtype, &[0.0; 256]), [0.0; 256], "{dtype}");
        // Constant, tiny, huge, one outlier: nothing but finite numbers comes back.
        for row in [[-3.0; 256], [3.0; 256], [1e-30; 256], [-1e30; 256], [f32::MAX; 256], [f32::MIN_POSITIVE; 256]] {
            assert!(round_trip(dtype, &row).iter().all(|v| v.is_finite()), "{dtype}: {}", row[0]);
        }
        assert!(round_trip(dtype, &[3.0; 256]).iter().all(|v| (v - 3.0).abs() < 0.05), "{dtype}");
        assert!(round_trip(dtype, &[-3.0; 256]).iter().all(|v| (v + 3.0).abs() < 0.05), "{dtype}");
        let mut row = [0.01; 256];
        row[77] = -50.0;
        assert!((round_trip(dtype, &row)[77] + 50.0).abs() < 1.0, "{dtype}");
    }
}

#[test]
fn sizes_and_fallbacks() {
    assert_eq!(DType::Q8_0.row_bytes(33), 68);
    assert_eq!(DType::Q4_K.row_bytes(512), 288);
    assert_eq!(DType::BF16.row_bytes(5), 10);
    assert_eq!((DType::Q4_K.for_rows_of(768), DType::Q6_K.for_rows_of(48)), (DType::Q4_K, DType::Q8_0));
    assert_eq!(DType::F32.for_rows_of(3), DType::F32);
}
