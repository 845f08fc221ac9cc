//! Secret bytes as hexadecimal digits, for `#[serde(with)]`: the digits are wiped.

use serde::{Serializer, ser::Error};
use zeroize::Zeroizing;

pub use hex::serde::deserialize;

/// Writes the bytes as 64 digits.
///
/// # Errors
/// Those of `serializer`.
pub fn serialize<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
    let mut digits = Zeroizing::new([0; 64]);
    hex::encode_to_slice(bytes, &mut *digits).map_err(S::Error::custom)?;
    let digits = std::str::from_utf8(&*digits).map_err(S::Error::custom)?;
    serializer.serialize_str(digits)
}
