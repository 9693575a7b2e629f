use half::bf16;

use super::*;
use crate::cpu::Element;

/// Numbers in −1..1 from a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }
}

/// A matrix with its memory: row-major, column-major, or with gaps both ways.
struct Matrix {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl Matrix {
    fn random(random: &mut Random, rows: usize, cols: usize, layout: usize) -> Matrix {
        let (row_stride, col_stride) = match layout {
            0 => (cols, 1),
            1 => (1, rows),
            2 => (cols + 3, 1),
            3 => (1, rows + 5),
            _ => (2 * cols + 1, 2),
        };
        let data = random.values(rows * row_stride + cols * col_stride + 1);
        Matrix { data, rows, cols, row_stride, col_stride }
    }

    fn view(&self) -> MatRef<'_> {
        MatRef::with_strides(&self.data, self.rows, self.cols, self.row_stride, self.col_stride)
    }
}

fn cpu(isa: Isa, threads: usize) -> Cpu {
    Cpu { pool: Pool::new(threads), isa }
}

fn run(cpu: &Cpu, start: Start<'_>, c: &[f32], a: MatRef<'_>, b: Rhs<'_>) -> Vec<f32> {
    let mut c = c.to_vec();
    let (m, n) = (a.rows(), b.shape().1);
    gemm(cpu, MatMut::new(&mut c, m, n), start, a, b);
    c
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Compares with a product in f64 under the bound the module states.
fn check(isa: Isa, got: &[f32], start: impl Fn(usize, usize) -> f32, a: MatRef<'_>, b: MatRef<'_>) {
    let (m, n, k) = (a.rows(), b.cols(), a.cols());
    let roundings = if isa == Isa::Portable { 2.0 } else { 1.0 };
    for i in 0..m {
        for j in 0..n {
            let first = f64::from(start(i, j));
            let (mut sum, mut size) = (first, first.abs());
            for l in 0..k {
                let product = f64::from(a.get(i, l)) * f64::from(b.get(l, j));
                sum += product;
                size += product.abs();
            }
            let bound = roundings * (k + 1) as f64 * 2f64.powi(-24) * size;
            let error = (f64::from(got[i * n + j]) - sum).abs();
            assert!(error <= bound, "{isa}: C[{i}, {j}] of {m} × {n} × {k} is off by {error}, bound {bound}");
        }
    }
}

/// Shapes at and around the edges of tiles and panels, and of Mamba's small products.
fn shapes(random: &mut Random) -> Vec<(usize, usize, usize)> {
    let mut shapes = vec![
        (1, 1, 1),
        (0, 5, 3),
        (5, 0, 3),
        (4, 7, 0),
        (1, 33, 0),
        (13, 300, 0),
        (1, 129, 40),
        (2, 128, 33),
        (3, 65, 17),
        (12, 32, 16),
        (13, 33, 17),
        (6, 16, 8),
        (7, 17, 9),
        (25, 290, 70),
        (64, 80, 192),
        (50, 48, 4),
        (5, 1, 200),
        (70, 260, 600),
        (200, 40, 1100),
    ];
    for _ in 0..30 {
        shapes.push((random.below(40), random.below(300), random.below(90)));
    }
    shapes
}

#[test]
fn products_agree_with_f64_for_all_shapes_strides_and_starts() {
    let mut random = Random(1);
    let shapes = shapes(&mut random);
    for isa in Isa::available() {
        let cpu = cpu(isa, 2);
        for (index, &(m, n, k)) in shapes.iter().enumerate() {
            let a = Matrix::random(&mut random, m, k, index % 5);
            let b = Matrix::random(&mut random, k, n, (index / 2 + 1) % 5);
            let c = random.values(m * n);
            let bias = random.values(n);
            check(isa, &run(&cpu, Start::Zero, &c, a.view(), b.view().into()), |_, _| 0.0, a.view(), b.view());
            check(isa, &run(&cpu, Start::C, &c, a.view(), b.view().into()), |i, j| c[i * n + j], a.view(), b.view());
            check(
                isa,
                &run(&cpu, Start::Bias(&bias), &c, a.view(), b.view().into()),
                |_, j| bias[j],
                a.view(),
                b.view(),
            );
        }
    }
}

#[test]
fn every_element_is_one_chain_through_all_blocks() {
    let mut random = Random(6);
    for isa in Isa::available() {
        let cpu = cpu(isa, 2);
        // More than one block of rows (A transposed, so it is packed), of columns and of k.
        for (m, n, k) in [(1600, 260, 9), (390, 3200, 7), (400, 30, 2100), (30, 40, 1100), (3, 70, 1100)] {
            let (a, b) = (Matrix::random(&mut random, m, k, 1), Matrix::random(&mut random, k, n, 1));
            let c = random.values(m * n);
            let got = run(&cpu, Start::C, &c, a.view(), b.view().into());
            for i in 0..m {
                for j in 0..n {
                    let mut sum = c[i * n + j];
                    for l in 0..k {
                        let (x, y) = (a.view().get(i, l), b.view().get(l, j));
                        sum = if isa == Isa::Portable { x * y + sum } else { x.mul_add(y, sum) };
                    }
                    assert_eq!(got[i * n + j].to_bits(), sum.to_bits(), "{isa}: C[{i}, {j}] of {m} × {n} × {k}");
                }
            }
        }
    }
}

#[test]
fn packing_changes_no_bit() {
    let mut random = Random(2);
    let shapes = shapes(&mut random);
    for isa in Isa::available() {
        let cpu = cpu(isa, 2);
        for (index, &(m, n, k)) in shapes.iter().enumerate() {
            let a = Matrix::random(&mut random, m, k, index % 5);
            let b = Matrix::random(&mut random, k, n, (index / 5) % 5);
            let c = random.values(m * n);
            let packed = PackedBuffer::<f32>::pack(&cpu.pool, isa, b.view());
            let want = run(&cpu, Start::C, &c, a.view(), b.view().into());
            assert_eq!(bits(&run(&cpu, Start::C, &c, a.view(), packed.matrix().into())), bits(&want), "{m} {n} {k}");

            // bf16 weights against the same values in f32; tiles round A, too, and have tests of their own.
            if isa == Isa::Amx {
                continue;
            }
            let rounded: Vec<f32> = b.data.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
            let view = MatRef::with_strides(&rounded, k, n, b.row_stride, b.col_stride);
            let narrow = PackedBuffer::<bf16>::pack(&cpu.pool, isa, b.view());
            let want = run(&cpu, Start::Zero, &c, a.view(), view.into());
            assert_eq!(bits(&run(&cpu, Start::Zero, &c, a.view(), narrow.matrix().into())), bits(&want), "{m} {n} {k}");

            let source: Vec<bf16> = b.data.iter().map(|&x| bf16::from_f32(x)).collect();
            let source = MatRef::with_strides(&source, k, n, b.row_stride, b.col_stride);
            let same = PackedBuffer::<bf16>::pack(&cpu.pool, isa, source);
            assert_eq!(bits(&run(&cpu, Start::Zero, &c, a.view(), same.matrix().into())), bits(&want));

            let mut column = vec![0.0; k];
            for j in 0..n {
                packed.matrix().column(j, &mut column);
                assert!((0..k).all(|i| column[i] == b.view().get(i, j)), "column {j} of {n}");
                narrow.matrix().column(j, &mut column);
                assert!((0..k).all(|i| column[i] == view.get(i, j)), "column {j} of {n}");
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_however_many_there_are() {
    let mut random = Random(3);
    for isa in Isa::available() {
        let cpu = cpu(isa, 2);
        for (m, n, k) in [(60, 330, 70), (29, 33, 1300), (40, 128, 5)] {
            let a = Matrix::random(&mut random, m, k, 0);
            let b = Matrix::random(&mut random, k, n, 1);
            let packed = PackedBuffer::<f32>::pack(&cpu.pool, isa, b.view());
            let bias = random.values(n);
            let whole = run(&cpu, Start::Bias(&bias), &vec![0.0; m * n], a.view(), b.view().into());
            for rows in 1..=m {
                let start = random.below(m - rows + 1);
                let part = a.view().row_range(start..start + rows);
                let c = vec![f32::NAN; rows * n];
                let want = bits(&whole[start * n..][..rows * n]);
                assert_eq!(bits(&run(&cpu, Start::Bias(&bias), &c, part, packed.matrix().into())), want, "{rows} rows");
                assert_eq!(bits(&run(&cpu, Start::Bias(&bias), &c, part, b.view().into())), want, "{rows} rows");
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let mut random = Random(4);
    for isa in Isa::available() {
        for (m, n, k) in [(150, 700, 530), (1, 3000, 700), (9, 900, 300), (400, 20, 700), (30, 4000, 33)] {
            let a = Matrix::random(&mut random, m, k, 0);
            let b = Matrix::random(&mut random, k, n, 1);
            let c = random.values(m * n);
            let one = cpu(isa, 1);
            let packed = PackedBuffer::<f32>::pack(&one.pool, isa, b.view());
            let want = bits(&run(&one, Start::C, &c, a.view(), b.view().into()));
            let mut serial = c.clone();
            gemm_serial(isa, MatMut::new(&mut serial, m, n), Start::C, a.view(), b.view());
            assert_eq!(bits(&serial), want);
            for threads in [2, 4] {
                let many = cpu(isa, threads);
                assert_eq!(bits(&run(&many, Start::C, &c, a.view(), b.view().into())), want);
                assert_eq!(bits(&run(&many, Start::C, &c, a.view(), packed.matrix().into())), want);
            }
        }
    }
}

#[test]
fn c_may_be_a_part_of_a_larger_matrix() {
    let mut random = Random(5);
    for isa in Isa::available() {
        let cpu = cpu(isa, 2);
        for (m, n, k) in [(14, 37, 20), (1, 70, 9), (13, 270, 8)] {
            let (a, b) = (Matrix::random(&mut random, m, k, 0), Matrix::random(&mut random, k, n, 0));
            let want = run(&cpu, Start::Zero, &vec![0.0; m * n], a.view(), b.view().into());
            let stride = n + 11;
            let mut memory = vec![-3.0; m * stride + 5];
            gemm(&cpu, MatMut::with_stride(&mut memory[5..], m, n, stride), Start::Zero, a.view(), b.view());
            for (index, &value) in memory.iter().enumerate() {
                let inside = index >= 5 && (index - 5) % stride < n && (index - 5) / stride < m;
                let expected = if inside { want[(index - 5) / stride * n + (index - 5) % stride] } else { -3.0 };
                assert_eq!(value, expected, "at {index}");
            }
        }
    }
}

#[test]
fn infinities_and_nan_stay_in_their_rows_and_columns() {
    for isa in Isa::available() {
        let cpu = cpu(isa, 1);
        let (m, n, k) = (14, 35, 6);
        let mut a = vec![1.0f32; m * k];
        a[3 * k] = f32::INFINITY;
        let mut b = vec![0.5f32; k * n];
        b[2 * n + 34] = f32::NAN;
        let c = run(&cpu, Start::Zero, &vec![0.0; m * n], MatRef::new(&a, m, k), MatRef::new(&b, k, n).into());
        for i in 0..m {
            for j in 0..n {
                let value = c[i * n + j];
                match (i, j) {
                    (_, 34) => assert!(value.is_nan()),
                    (3, _) => assert_eq!(value, f32::INFINITY),
                    _ => assert_eq!(value, 3.0),
                }
            }
        }
    }
}

#[test]
fn views_check_their_bounds() {
    let data = [0.0f32; 12];
    assert_eq!(MatRef::new(&data, 3, 4).t().row_stride(), 1);
    assert!(std::panic::catch_unwind(|| MatRef::new(&[0.0f32; 12], 3, 5)).is_err());
    assert!(std::panic::catch_unwind(|| MatRef::with_strides(&[0.0f32; 12], 3, 4, 5, 1)).is_err());
    assert!(std::panic::catch_unwind(|| MatMut::with_stride(&mut [0.0; 12], 3, 4, 3).rows()).is_err());
    assert!(std::panic::catch_unwind(|| MatRef::new(&[0.0f32; 12], 3, 4).row_range(2..4).rows()).is_err());
    assert_eq!(bf16::narrow(1.0).widen(), 1.0);
}

/// What `tiles` states, plainly: C[i, j] from its start value.
fn by_tiles(start: f32, a: MatRef<'_>, b: MatRef<'_>, i: usize, j: usize) -> f32 {
    let round = |x: f32| bf16::from_f32(x).to_f32();
    let mut total = start;
    for first in (0..a.cols()).step_by(tiles::STEPS) {
        let mut sums = [0.0f32; 2];
        for k in first..a.cols().min(first + tiles::STEPS) {
            sums[k % 2] = round(a.get(i, k)).mul_add(round(b.get(k, j)), sums[k % 2]);
        }
        total += sums[0] + sums[1];
    }
    total
}

#[test]
fn products_of_bf16_by_tiles_have_the_bits_stated_for_all_shapes_strides_starts_and_threads() {
    let mut random = Random(6);
    let more = [(33, 35, 31), (17, 16, 64), (16, 33, 65), (1, 50, 257), (40, 600, 33), (5, 31, 2100), (600, 90, 70)];
    for isa in Isa::available() {
        for (index, (m, n, k)) in shapes(&mut random).into_iter().chain(more).enumerate() {
            let cpu = cpu(isa, 1 + index % 3);
            let a = Matrix::random(&mut random, m, k, index % 5);
            let b = Matrix::random(&mut random, k, n, (index / 5) % 5);
            let (c, bias) = (random.values(m * n), random.values(n));
            let packed = PackedBuffer::<bf16>::pack(&cpu.pool, Isa::Amx, b.view());
            for start in [Start::Zero, Start::C, Start::Bias(&bias)] {
                let got = run(&cpu, start, &c, a.view(), Rhs::Rounded(b.view()));
                for i in 0..m {
                    for j in 0..n {
                        let first = match start {
                            Start::Zero => 0.0,
                            Start::C => c[i * n + j],
                            Start::Bias(bias) => bias[j],
                        };
                        let want = by_tiles(first, a.view(), b.view(), i, j);
                        assert_eq!(got[i * n + j], want, "{isa}: C[{i}, {j}] of {m} × {n} × {k}");
                    }
                }
                let same = run(&cpu, start, &c, a.view(), packed.matrix().into());
                assert_eq!(bits(&same), bits(&got), "{isa}: {m} × {n} × {k}");
            }
            let mut column = vec![0.0; k];
            for j in 0..n {
                packed.matrix().column(j, &mut column);
                let rounded = |i| bf16::from_f32(b.view().get(i, j)).to_f32();
                assert!((0..k).all(|i| column[i] == rounded(i)), "column {j} of {n}");
            }
        }
    }
}

#[test]
fn products_by_tiles_write_their_part_of_c_alone_and_agree_with_f64() {
    let mut random = Random(7);
    for isa in Isa::available() {
        let cpu = cpu(isa, 2);
        for (m, n, k) in [(14, 37, 20), (1, 70, 900), (70, 49, 333)] {
            let (a, b) = (Matrix::random(&mut random, m, k, 0), Matrix::random(&mut random, k, n, 1));
            let stride = n + 11;
            let mut memory = vec![-3.0; m * stride + 5];
            gemm(
                &cpu,
                MatMut::with_stride(&mut memory[5..], m, n, stride),
                Start::Zero,
                a.view(),
                Rhs::Rounded(b.view()),
            );
            for (index, &value) in memory.iter().enumerate() {
                let (i, j) = (index.wrapping_sub(5) / stride, index.wrapping_sub(5) % stride);
                if index < 5 || j >= n || i >= m {
                    assert_eq!(value, -3.0, "at {index}");
                    continue;
                }
                let (mut sum, mut size) = (0.0, 0.0);
                for l in 0..k {
                    let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
                    let product = round(a.view().get(i, l)) * round(b.view().get(l, j));
                    sum += product;
                    size += product.abs();
                }
                let error = (f64::from(value) - sum).abs();
                let bound = (k / 32 + 18) as f64 * 2f64.powi(-24) * size;
                assert!(error <= bound, "{isa}: C[{i}, {j}] of {m} × {n} × {k} is off by {error}, bound {bound}");
            }
        }
    }
}
