//! The byte alphabet of byte-level BPE (GPT-2's `bytes_to_unicode`): every byte is written as one printable letter,
//! so that vocabularies and merges are plain text. Printable Latin-1 stands for itself; the other 68 bytes, in
//! order, are U+0100 to U+0143. So a space is `Ġ` and a newline `Ċ`.

/// The letter that stands for `byte`.
pub fn letter(byte: u8) -> char {
    let printable_below = match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => return byte.into(),
        0..=b' ' => 0,
        0x7F..=0xA0 => 94,
        0xAD => 94 + 12,
    };
    char::from_u32(0x100 + u32::from(byte) - printable_below).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte that `letter` stands for; `None` if it is not in the alphabet.
pub(super) fn byte(letter: char) -> Option<u8> {
    match u32::from(letter) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// Appends the bytes that a token's letters stand for. A letter outside the alphabet, which no text reaches but a
/// careless converter writes, stands for itself.
pub(super) fn append_bytes(token: &str, bytes: &mut Vec<u8>) {
    for c in token.chars() {
        match byte(c) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_one_to_one() {
        let mut next = 0x100;
        for b in 0..=255u8 {
            let printable = matches!(b, 33..=126 | 161..=172 | 174..=255);
            let expected = if printable {
                char::from(b)
            } else {
                next += 1;
                char::from_u32(next - 1).unwrap()
            };
            assert_eq!(letter(b), expected, "byte {b:#04x}");
            assert_eq!(byte(expected), Some(b));
        }
        assert_eq!(next, 0x144);
        assert_eq!([byte(' '), byte('\u{144}'), byte('中')], [None; 3]);
    }
}
