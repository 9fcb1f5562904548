//! The flags of the benchmark programs. Each has a value.

use anyhow::{Context, Result, bail};

/// Passes each flag of the command line with its value to `take`.
///
/// # Errors
/// For a flag that is not in `known` or has no value, and the errors of `take`.
pub fn each(known: &[&str], mut take: impl FnMut(&str, String) -> Result<()>) -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if !known.contains(&name.as_str()) {
            bail!("unknown flag {name}; known: {}", known.join(", "));
        }
        let value = arguments.next();
        let value = value.with_context(|| format!("{name} needs a value"))?;
        take(&name, value).with_context(|| name.clone())?;
    }
    Ok(())
}
