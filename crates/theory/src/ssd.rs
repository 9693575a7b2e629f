//! State space duality (Dao & Gu 2024, arXiv 2405.21060): one head of Mamba-2 as a recurrence, as masked linear
//! attention and in chunks.
//!
//! S_t = a_t S_{t−1} + x_t ⊗ B_t, y_t = S_t C_t. All at once y = (L ∘ C Bᵀ) x with L_ij = a_i … a_{j+1} for i ≥ j: linear
//! attention, without softmax, under a mask that is 1-semiseparable. (Mamba-2's x is Δx here.)

use nalgebra::DMatrix;

use crate::error::{Error, positive};

/// The inputs of a head: T steps, width P, state size N.
#[derive(Clone, Debug)]
pub struct Head {
    /// log a_t `[T]`; sums of it are stable where products of a are not.
    pub log_a: Vec<f64>,
    /// `[T, N]`
    pub b: DMatrix<f64>,
    /// `[T, N]`
    pub c: DMatrix<f64>,
    /// `[T, P]`
    pub x: DMatrix<f64>,
}

impl Head {
    /// Checks that the parts fit together.
    ///
    /// # Errors
    /// Other numbers of rows; no step; state size or width 0.
    pub fn new(log_a: Vec<f64>, b: DMatrix<f64>, c: DMatrix<f64>, x: DMatrix<f64>) -> Result<Head, Error> {
        let steps = positive("the number of steps", log_a.len())?;
        let n = positive("the state size", b.ncols())?;
        let p = positive("the head dimension", x.ncols())?;
        for (what, m, cols) in [("B", &b, n), ("C", &c, n), ("x", &x, p)] {
            if m.shape() != (steps, cols) {
                let (found, expected) = (format!("{:?}", m.shape()), format!("({steps}, {cols})"));
                return Err(Error::Shape { what, found, expected });
            }
        }
        Ok(Head { log_a, b, c, x })
    }

    fn steps(&self) -> usize {
        self.log_a.len()
    }

    /// Step after step: 2TPN multiply-adds, a state of PN numbers.
    pub fn recurrence(&self) -> DMatrix<f64> {
        let mut state = DMatrix::zeros(self.x.ncols(), self.b.ncols());
        let mut y = DMatrix::zeros(self.steps(), self.x.ncols());
        for t in 0..self.steps() {
            state *= self.log_a[t].exp();
            state += self.x.row(t).transpose() * self.b.row(t);
            y.set_row(t, &(&state * self.c.row(t).transpose()).transpose());
        }
        y
    }

    /// The mask L of rows and columns in a range of steps: exp of sums of log a between them, 0 above the diagonal. A
    /// difference of sums from the start, masked before the exp, so that nothing overflows.
    pub fn mask(&self, from: usize, to: usize) -> DMatrix<f64> {
        let sums: Vec<f64> = self.log_a[from..to]
            .iter()
            .scan(0.0, |sum, a| {
                *sum += a;
                Some(*sum)
            })
            .collect();
        DMatrix::from_fn(to - from, to - from, |i, j| if i >= j { (sums[i] - sums[j]).exp() } else { 0.0 })
    }

    /// The matrix M = L ∘ C Bᵀ with y = M x.
    pub fn matrix(&self) -> DMatrix<f64> {
        self.mask(0, self.steps()).component_mul(&(&self.c * self.b.transpose()))
    }

    /// Masked linear attention: T²(N + P) multiply-adds, no state.
    pub fn attention(&self) -> DMatrix<f64> {
        self.matrix() * &self.x
    }

    /// In chunks: products of matrices inside of each, one state from each to the next. O(TPN), nearly all of it in
    /// products of matrices.
    ///
    /// # Errors
    /// Chunks of length 0.
    pub fn chunked(&self, length: usize) -> Result<DMatrix<f64>, Error> {
        positive("the chunk length", length)?;
        let mut y = DMatrix::zeros(self.steps(), self.x.ncols());
        let mut state = DMatrix::zeros(self.x.ncols(), self.b.ncols());
        for from in (0..self.steps()).step_by(length) {
            let to = self.steps().min(from + length);
            let rows = |m: &DMatrix<f64>| m.rows(from, to - from).into_owned();
            let (b, c, x) = (rows(&self.b), rows(&self.c), rows(&self.x));
            let mask = self.mask(from, to);
            // The decay from the chunk's start, its first step included.
            let from_start: Vec<f64> = (0..to - from).map(|i| mask[(i, 0)] * self.log_a[from].exp()).collect();
            let inside = mask.component_mul(&(&c * b.transpose())) * &x;
            let mut before = c * state.transpose();
            before.row_iter_mut().zip(&from_start).for_each(|(mut row, decay)| row *= *decay);
            y.rows_mut(from, to - from).copy_from(&(inside + before));
            let mut to_end = x;
            let last = to - from - 1;
            to_end.row_iter_mut().enumerate().for_each(|(j, mut row)| row *= mask[(last, j)]);
            state = state * from_start[last] + to_end.transpose() * b;
        }
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::relative_error;

    fn head(t: usize, n: usize, p: usize) -> Head {
        let mut random = Random::new(8);
        let log_a = (0..t).map(|_| -random.uniform()).collect();
        let mut matrix = |cols: usize| DMatrix::from_fn(t, cols, |_, _| random.normal());
        Head::new(log_a, matrix(n), matrix(n), matrix(p)).unwrap()
    }

    #[test]
    fn three_ways_to_one_result() {
        for (t, n, p) in [(1, 1, 1), (7, 3, 2), (50, 4, 8)] {
            let head = head(t, n, p);
            let expected = head.recurrence();
            for length in [1, 3, 16, 50] {
                let found = head.chunked(length).unwrap();
                assert!(relative_error(found.as_slice(), expected.as_slice()) < 1e-12, "{t} {length}");
            }
            assert!(relative_error(head.attention().as_slice(), expected.as_slice()) < 1e-12, "{t}");
        }
    }

    #[test]
    fn blocks_below_the_diagonal_have_the_rank_of_the_state() {
        let m = head(24, 3, 1).matrix();
        let block = m.view((12, 0), (12, 12)).into_owned();
        let values = block.singular_values();
        assert!(values[2] > 1e-6 * values[0] && values[3] < 1e-12 * values[0], "{values}");
    }

    #[test]
    fn steps_that_forget_everything_do_not_overflow() {
        let mut head = head(9, 2, 2);
        head.log_a = vec![-800.0; 9];
        assert!(head.attention().iter().all(|v| v.is_finite()));
        assert!(relative_error(head.chunked(4).unwrap().as_slice(), head.recurrence().as_slice()) < 1e-13);
    }

    #[test]
    fn impossible_sizes_are_named() {
        let head = head(4, 2, 2);
        assert!(head.chunked(0).unwrap_err().to_string().contains("chunk length is 0"));
        let none = Head::new(vec![0.0; 4], DMatrix::zeros(4, 0), head.c.clone(), head.x.clone());
        assert!(none.unwrap_err().to_string().contains("state size is 0"));
        let odd = Head::new(vec![0.0; 3], head.b, head.c, head.x);
        assert_eq!(odd.unwrap_err().to_string(), "B is (4, 2); expected (3, 2)");
    }
}
