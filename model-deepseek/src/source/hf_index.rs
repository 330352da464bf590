//! `model.safetensors.index.json`: which file has which tensor.
//!
//! An index may have a hundred thousand entries; it is walked, not kept.

use super::{
    Place, SourceError,
    error::{Flaw, clipped},
};
use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor},
};
use std::{collections::BTreeSet, fmt, path::Path};

/// The most files an index may name.
pub(super) const MAX_FILES: usize = 4096;

/// The files that an index names.
pub(super) fn files_of_index(json: &[u8], path: &Path) -> Result<BTreeSet<String>, SourceError> {
    let mut files = BTreeSet::new();
    for_each_entry(json, path, |tensor, file| {
        if files.contains(file) {
            return Ok(());
        }
        let plain = Path::new(file).file_name().is_some_and(|name| name == file) && !file.contains('\\');
        if !plain || !file.ends_with(".safetensors") {
            let place = Place::Tensor(tensor.to_owned());
            let expected = "the name of a .safetensors file in this directory";
            return Err(Flaw::new(expected, format!("`{}`", clipped(file))).at(path, place));
        }
        if files.len() == MAX_FILES {
            let expected = format!("at most {MAX_FILES} files");
            return Err(SourceError::invalid(path, Place::Key("weight_map".into()), expected, "more"));
        }
        files.insert(file.to_owned());
        Ok(())
    })?;
    Ok(files)
}

/// Calls `visit` with every tensor and file of an index's `weight_map`, and keeps nothing.
pub(super) fn for_each_entry(
    json: &[u8],
    path: &Path,
    mut visit: impl FnMut(&str, &str) -> Result<(), SourceError>,
) -> Result<(), SourceError> {
    let mut wrong = None;
    let mut seen = false;
    let walk = Walk { visit: &mut visit, wrong: &mut wrong, seen: &mut seen, inside: false };
    let mut json = serde_json::Deserializer::from_slice(json);
    let result = walk.deserialize(&mut json).and_then(|()| json.end());
    match (result, wrong) {
        (_, Some(error)) => Err(error),
        (Err(e), None) => {
            Err(SourceError::invalid(path, Place::Header, "the JSON of an index", e.to_string()))
        }
        (Ok(()), None) if !seen => {
            Err(SourceError::missing(path, Place::Key("weight_map".into()), "tensors and their files"))
        }
        (Ok(()), None) => Ok(()),
    }
}

/// The walk through an index: the outer object, and inside it `weight_map`.
struct Walk<'a, F> {
    visit: &'a mut F,
    wrong: &'a mut Option<SourceError>,
    seen: &'a mut bool,
    inside: bool,
}

impl<'de, F: FnMut(&str, &str) -> Result<(), SourceError>> DeserializeSeed<'de> for Walk<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, F: FnMut(&str, &str) -> Result<(), SourceError>> Visitor<'de> for Walk<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.inside { "an object of tensors and files" } else { "an object with weight_map" })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Walk { visit, wrong, seen, inside } = self;
        while let Some(key) = map.next_key::<String>()? {
            if inside {
                if let Err(error) = visit(&key, &map.next_value::<String>()?) {
                    *wrong = Some(error);
                    return Err(A::Error::custom("an entry is wrong"));
                }
            } else if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
            } else if std::mem::replace(seen, true) {
                return Err(A::Error::duplicate_field("weight_map"));
            } else {
                let walk = Walk { visit: &mut *visit, wrong: &mut *wrong, seen: &mut *seen, inside: true };
                map.next_value_seed(walk)?;
            }
        }
        Ok(())
    }
}
