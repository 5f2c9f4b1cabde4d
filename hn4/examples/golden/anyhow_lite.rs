//! Errors as text: what a runner of golden cases needs and no more.

use std::fmt::Display;

pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// Why a case failed, or could not be run.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

pub(crate) fn bail<T>(text: impl Display) -> Result<T> {
    Err(Failure(text.to_string()))
}

/// Adds what was being done.
pub(crate) trait Context<T> {
    fn context(self, text: &str) -> Result<T>;
    fn with_context(self, text: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for Option<T> {
    fn context(self, text: &str) -> Result<T> {
        self.ok_or_else(|| Failure(text.to_owned()))
    }
    fn with_context(self, text: impl FnOnce() -> String) -> Result<T> {
        self.ok_or_else(|| Failure(text()))
    }
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn context(self, text: &str) -> Result<T> {
        self.map_err(|error| Failure(format!("{text}: {error}")))
    }
    fn with_context(self, text: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure(format!("{}: {error}", text())))
    }
}
