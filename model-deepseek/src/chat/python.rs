//! Where Jinja in Python writes values otherwise than Jinja in Rust.

use super::bounds::{BYTES_PER_FUEL, DEEPEST};
use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, ValueKind},
};
use serde_json::Value as Json;
use std::fmt::Write;

/// What Python calls the values that have other names in Jinja.
pub(super) fn literal(value: &Value) -> Option<&'static str> {
    match value.kind() {
        ValueKind::None => Some("None"),
        ValueKind::Bool => Some(if value.is_true() { "True" } else { "False" }),
        _ => None,
    }
}

/// The filter `tojson` as Hugging Face has it: `json.dumps` with `ensure_ascii` off, and nothing escaped for HTML.
pub(super) fn tojson(state: &State<'_, '_>, value: &Value, options: Kwargs) -> Result<String, Error> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidOperation, message);
    let json = json(value, 0)?;
    let indent = match options.get::<Option<Value>>("indent")?.filter(|value| !value.is_none()) {
        None => None,
        Some(value) => Some(match (value.as_str(), value.as_usize()) {
            (Some(text), _) => text.to_owned(),
            (_, Some(width)) if width <= 64 => " ".repeat(width),
            _ => {
                return Err(invalid(format!(
                    "tojson: expected an indent of at most 64 or a string, found {value}"
                )));
            }
        }),
    };
    let default = (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    let (item, key) = match options.get::<Option<Value>>("separators")?.filter(|value| !value.is_none()) {
        None => default,
        Some(value) => {
            let pair: Vec<String> =
                value.try_iter()?.filter_map(|part| part.as_str().map(str::to_owned)).collect();
            let pair: Result<[String; 2], _> = pair.try_into();
            pair.map(|[item, key]| (item, key))
                .map_err(|_| invalid(format!("tojson: expected two strings as separators, found {value}")))?
        }
    };
    let writer = Writer {
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item,
        key,
        // The engine lets pay for a text when it is there.
        longest: state.fuel_levels().map_or(u64::MAX, |(_, left)| left.saturating_mul(BYTES_PER_FUEL)),
    };
    options.assert_all_used()?;
    let mut text = String::new();
    writer.value(&json, 0, &mut text)?;
    Ok(text)
}

/// A value as JSON, unless it is nested so deep that only a broken template can mean it.
fn json(value: &Value, depth: usize) -> Result<Json, Error> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidOperation, message);
    if depth > DEEPEST {
        return Err(invalid(format!("tojson: expected a value nested at most {DEEPEST} deep")));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter()?.map(|item| json(&item, depth + 1)).collect()
        }
        ValueKind::Map => {
            let entry = |key: Value| Ok((key.to_string(), json(&value.get_item(&key)?, depth + 1)?));
            Ok(Json::Object(value.try_iter()?.map(entry).collect::<Result<_, Error>>()?))
        }
        ValueKind::Undefined => Err(invalid("tojson: expected a value, found an undefined one".into())),
        _ => serde_json::to_value(value).map_err(|error| invalid(format!("tojson: {error}"))),
    }
}

/// `json.JSONEncoder`.
struct Writer {
    ascii: bool,
    sorted: bool,
    indent: Option<String>,
    item: String,
    key: String,
    /// Bytes, after which it gives up.
    longest: u64,
}

impl Writer {
    fn value(&self, value: &Json, depth: usize, out: &mut String) -> Result<(), Error> {
        match value {
            Json::Null => out.push_str("null"),
            Json::Bool(truth) => out.push_str(if *truth { "true" } else { "false" }),
            Json::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
                Some(float) => out.push_str(&float_repr(float)),
                None => out.push_str(&number.to_string()),
            },
            Json::String(text) => self.string(text, out),
            Json::Array(items) => {
                self.list(['[', ']'], items, depth, out, |item, out| self.value(item, depth + 1, out))?;
            }
            Json::Object(entries) => {
                let mut entries: Vec<_> = entries.iter().collect();
                if self.sorted {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.list(['{', '}'], &entries, depth, out, |(key, value), out| {
                    self.string(key, out);
                    out.push_str(&self.key);
                    self.value(value, depth + 1, out)
                })?;
            }
        }
        Ok(())
    }

    fn list<T>(
        &self,
        [open, close]: [char; 2],
        items: &[T],
        depth: usize,
        out: &mut String,
        each: impl Fn(&T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let new_line = |depth: usize, out: &mut String| {
            let Some(indent) = &self.indent else { return Ok(()) };
            out.push('\n');
            (0..depth).try_for_each(|_| {
                out.push_str(indent);
                self.within_longest(out)
            })
        };
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item);
            }
            new_line(depth + 1, out)?;
            each(item, out)?;
            self.within_longest(out)?;
        }
        if !items.is_empty() {
            new_line(depth, out)?;
        }
        out.push(close);
        Ok(())
    }

    fn within_longest(&self, out: &str) -> Result<(), Error> {
        if out.len() as u64 > self.longest { Err(ErrorKind::OutOfFuel.into()) } else { Ok(()) }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // writing to a string cannot fail
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// `repr` of a float: the shortest digits that give it back, with an exponent below 1e-4 and from 1e16 on.
fn float_repr(float: f64) -> String {
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        return format!("{float:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// `strftime` for the time that is `seconds` after 1970 began, in UTC. Fails for what is not a common directive.
pub(super) fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = rest.next().unwrap_or('%');
        let hour = second / 3600;
        out.push_str(&match directive {
            '%' => "%".into(),
            'Y' => year.to_string(),
            'y' => format!("{:02}", year % 100),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'H' => format!("{hour:02}"),
            'I' => format!("{:02}", (hour + 11) % 12 + 1),
            'p' => if hour < 12 { "AM" } else { "PM" }.into(),
            'M' => format!("{:02}", second / 60 % 60),
            'S' => format!("{:02}", second % 60),
            'B' => month_name.into(),
            'b' => month_name[..3].into(),
            'A' => day_name.into(),
            'a' => day_name[..3].into(),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'T' => format!("{hour:02}:{:02}:{:02}", second / 60 % 60, second % 60),
            'Z' => "UTC".into(),
            other => {
                let message = format!("strftime_now: expected one of %YymdHIpMSBbAaFTZ, found %{other}");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        });
    }
    Ok(out)
}

/// Year, month and day, the latter two from 1, of the day that is `days` after 1970-01-01 in the Gregorian calendar.
fn date(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // 400 years are 146,097 days: whole such cycles at once, the rest year by year
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_as_python_writes_them() {
        for (float, repr) in [
            (0.0, "0.0"),
            (-1.0, "-1.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-2.5e300, "-2.5e+300"),
        ] {
            assert_eq!(float_repr(float), repr);
        }
    }

    #[test]
    fn dates_as_python_writes_them() {
        let all = "%Y-%m-%d %y %H:%M:%S %I%p %B %b %A %a %F %T %Z %%";
        for (seconds, expected) in [
            (0, "1970-01-01 70 00:00:00 12AM January Jan Thursday Thu 1970-01-01 00:00:00 UTC %"),
            (951_782_399, "2000-02-28 00 23:59:59 11PM February Feb Monday Mon 2000-02-28 23:59:59 UTC %"),
            (951_782_400, "2000-02-29 00 00:00:00 12AM February Feb Tuesday Tue 2000-02-29 00:00:00 UTC %"),
            (1_735_689_599, "2024-12-31 24 23:59:59 11PM December Dec Tuesday Tue 2024-12-31 23:59:59 UTC %"),
            (4_107_587_445, "2100-03-01 00 12:30:45 12PM March Mar Monday Mon 2100-03-01 12:30:45 UTC %"),
        ] {
            assert_eq!(strftime(all, seconds).unwrap(), expected);
        }
        assert!(strftime("%Q", 0).unwrap_err().to_string().contains("%Q"));
        assert_eq!(strftime("100%", 0).unwrap(), "100%");
    }
}
