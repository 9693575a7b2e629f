/// What cannot be computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A size that is not possible.
    #[error("{what} is {found}; expected {expected}")]
    Size { what: &'static str, found: usize, expected: &'static str },
    /// A number outside its range.
    #[error("{what} is {found}; expected {expected}")]
    Value { what: &'static str, found: f64, expected: &'static str },
    /// Operands that do not fit together.
    #[error("{what} is {found}; expected {expected}")]
    Shape { what: &'static str, found: String, expected: String },
    /// A system of equations without a unique solution.
    #[error("{what} cannot be inverted")]
    Singular { what: &'static str },
}

/// A size from 1 up.
pub(crate) fn positive(what: &'static str, found: usize) -> Result<usize, Error> {
    if found == 0 { Err(Error::Size { what, found, expected: "a whole number from 1 up" }) } else { Ok(found) }
}

/// A finite number above 0.
pub(crate) fn above_zero(what: &'static str, found: f64) -> Result<f64, Error> {
    if found > 0.0 && found.is_finite() {
        Ok(found)
    } else {
        Err(Error::Value { what, found, expected: "a number above 0" })
    }
}
