//! Walks through a TOML document and keeps a list of what is wrong with it.
//!
//! A getter that finds something wrong notes it and answers as if the key were missing, so that one
//! pass finds everything.

use std::ops::RangeInclusive;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Problem;

/// A table of the document.
#[derive(Clone)]
pub(super) struct Table<'t> {
    /// For messages, such as `volume "vol0"`. Empty for the document itself.
    pub(super) label: String,
    /// Byte offset in the text.
    pub(super) at: usize,
    entries: &'t DeTable<'t>,
}

/// A value and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Found<T> {
    pub(super) value: T,
    /// Byte offset in the text.
    pub(super) at: usize,
}

/// See the module.
pub(super) struct Reader<'t> {
    text: &'t str,
    problems: Vec<Problem>,
}

impl<'t> Table<'t> {
    pub(super) fn root(entries: &'t DeTable<'t>) -> Self {
        Self {
            label: String::new(),
            at: 0,
            entries,
        }
    }

    /// Section and key, for messages.
    pub(super) fn key(&self, key: &str) -> String {
        match (self.label.as_str(), key) {
            ("", key) => key.to_owned(),
            (label, "") => label.to_owned(),
            (label, key) => format!("{label}, {key}"),
        }
    }

    /// Where the value of a key stands, or else the section.
    pub(super) fn at_of(&self, key: &str) -> usize {
        self.get(key).map_or(self.at, |value| value.span().start)
    }

    /// Whether the key is there.
    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn get(&self, key: &str) -> Option<&'t Spanned<DeValue<'t>>> {
        self.entries.get(key)
    }

    /// The text of a key, if it is one; nothing is noted.
    pub(super) fn peek_text(&self, key: &str) -> Option<&'t str> {
        match self.get(key)?.get_ref() {
            DeValue::String(text) => Some(text),
            _ => None,
        }
    }
}

/// What a value is, for messages.
fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a section",
    }
}

/// The unit that a key's name ends in.
fn unit(key: &str) -> &'static str {
    match key.rsplit('_').next() {
        Some("ms") => " milliseconds",
        Some("s" | "seconds") => " seconds",
        Some("bytes") => " bytes",
        Some("mib") => " MiB",
        _ => "",
    }
}

/// The known name that is most like a wrong one, if any is like it.
pub(super) fn nearest<'k>(wrong: &str, known: &[&'k str]) -> Option<&'k str> {
    let likeness = |name: &str| {
        // A name without its unit is the most common mistake.
        let prefix = name.starts_with(wrong) || wrong.starts_with(name);
        let bonus = if prefix && wrong.len() > 2 { 0.5 } else { 0.0 };
        strsim::normalized_damerau_levenshtein(wrong, name) + bonus
    };
    let best = known
        .iter()
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(best) >= 0.5).then_some(best)
}

impl<'t> Reader<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self {
            text,
            problems: Vec::new(),
        }
    }

    /// Everything that was noted, in the order of the file.
    pub(super) fn into_problems(mut self) -> Vec<Problem> {
        self.problems.sort_by_key(|problem| problem.line);
        self.problems
    }

    pub(super) fn note(&mut self, at: usize, key: String, what: String) {
        let before = self.text.get(..at).unwrap_or(self.text);
        let line = before.bytes().filter(|&byte| byte == b'\n').count() + 1;
        self.problems.push(Problem { line, key, what });
    }

    pub(super) fn refuse_unknown(&mut self, table: &Table<'t>, known: &[&str]) {
        for key in table.entries.keys() {
            let name = key.get_ref().as_ref();
            if known.contains(&name) {
                continue;
            }
            let hint = match nearest(name, known) {
                Some(name) => format!("did you mean \"{name}\"?"),
                None => format!("known are {}", known.join(", ")),
            };
            let what = format!("there is no such key; {hint}");
            self.note(key.span().start, table.key(name), what);
        }
    }

    fn wrong_kind(&mut self, table: &Table<'t>, key: &str, expected: &str) {
        if let Some(value) = table.get(key) {
            let what = format!("this is {}; expected {expected}", kind(value.get_ref()));
            self.note(value.span().start, table.key(key), what);
        }
    }

    pub(super) fn text(&mut self, table: &Table<'t>, key: &str) -> Option<Found<&'t str>> {
        let value = table.get(key)?;
        match value.get_ref() {
            DeValue::String(text) if text.is_empty() => {
                let what = "must not be empty".to_owned();
                self.note(value.span().start, table.key(key), what);
                None
            }
            DeValue::String(text) => Some(Found {
                value: text.as_ref(),
                at: value.span().start,
            }),
            _ => {
                self.wrong_kind(table, key, "a text in quotes");
                None
            }
        }
    }

    /// A text that must be there; `example` shows what it looks like.
    pub(super) fn needed(
        &mut self,
        table: &Table<'t>,
        key: &str,
        example: &str,
    ) -> Option<Found<&'t str>> {
        if table.get(key).is_none() {
            let what = format!("is missing; write, for example, {key} = \"{example}\"");
            self.note(table.at, table.key(key), what);
        }
        self.text(table, key)
    }

    pub(super) fn flag(&mut self, table: &Table<'t>, key: &str) -> bool {
        match table.get(key).map(Spanned::get_ref) {
            None => false,
            Some(DeValue::Boolean(value)) => *value,
            Some(_) => {
                self.wrong_kind(table, key, "true or false, without quotes");
                false
            }
        }
    }

    pub(super) fn number(
        &mut self,
        table: &Table<'t>,
        key: &str,
        range: &RangeInclusive<u64>,
    ) -> Option<u64> {
        let value = table.get(key)?;
        let (low, high, unit) = (range.start(), range.end(), unit(key));
        let DeValue::Integer(number) = value.get_ref() else {
            let expected = format!("a whole number from {low} to {high}{unit}, without quotes");
            self.wrong_kind(table, key, &expected);
            return None;
        };
        let parsed = u64::from_str_radix(number.as_str(), number.radix()).ok();
        let inside = parsed.filter(|value| range.contains(value));
        if inside.is_none() {
            let what = format!("{number} is not allowed; choose from {low} to {high}{unit}");
            self.note(value.span().start, table.key(key), what);
        }
        inside
    }

    pub(super) fn choice<T: Copy>(
        &mut self,
        table: &Table<'t>,
        key: &str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        let found = self.text(table, key)?;
        let chosen = choices.iter().find(|(name, _)| *name == found.value);
        if let Some((_, value)) = chosen {
            return Some(*value);
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let what = format!(
            "\"{}\" is not allowed; choose one of {}",
            found.value,
            names.join(", ")
        );
        self.note(found.at, table.key(key), what);
        None
    }

    pub(super) fn texts(&mut self, table: &Table<'t>, key: &str) -> Vec<Found<&'t str>> {
        let Some(value) = table.get(key) else {
            return Vec::new();
        };
        let DeValue::Array(items) = value.get_ref() else {
            self.wrong_kind(table, key, "a list of texts in brackets");
            return Vec::new();
        };
        let mut all = Vec::new();
        for item in items {
            let at = item.span().start;
            match item.get_ref() {
                DeValue::String(text) => all.push(Found {
                    value: text.as_ref(),
                    at,
                }),
                other => {
                    let what = format!("the list holds {}; expected a text", kind(other));
                    self.note(at, table.key(key), what);
                }
            }
        }
        all
    }

    /// The section `[key]`.
    pub(super) fn section(&mut self, table: &Table<'t>, key: &str) -> Option<Table<'t>> {
        let value = table.get(key)?;
        let DeValue::Table(entries) = value.get_ref() else {
            self.wrong_kind(table, key, &format!("one section [{key}]"));
            return None;
        };
        Some(Table {
            label: table.key(key),
            at: value.span().start,
            entries,
        })
    }

    /// The sections `[[key]]`, at most so many.
    pub(super) fn sections(
        &mut self,
        table: &Table<'t>,
        key: &str,
        written: &str,
        most: usize,
    ) -> Vec<Table<'t>> {
        let Some(value) = table.get(key) else {
            return Vec::new();
        };
        let DeValue::Array(items) = value.get_ref() else {
            self.wrong_kind(table, key, &format!("sections written [[{written}]]"));
            return Vec::new();
        };
        if items.len() > most {
            let what = format!("{} sections; at most {most} are allowed", items.len());
            self.note(value.span().start, table.key(key), what);
        }
        let mut all = Vec::new();
        for (index, item) in items.iter().take(most).enumerate() {
            let at = item.span().start;
            let DeValue::Table(entries) = item.get_ref() else {
                let what = format!("expected a section written [[{written}]]");
                self.note(at, table.key(key), what);
                continue;
            };
            let mut section = Table {
                label: String::new(),
                at,
                entries,
            };
            let own = match section.peek_text("name") {
                Some(name) => format!("{key} {name:?}"),
                None => format!("{key} number {}", index + 1),
            };
            section.label = table.key(&own);
            all.push(section);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_name_brings_the_nearest_known_one_and_only_if_it_is_near() {
        let known = ["log_age_ms", "overlay_mib", "backing", "ack"];
        assert_eq!(nearest("log_age", &known), Some("log_age_ms"));
        assert_eq!(nearest("overlay_mb", &known), Some("overlay_mib"));
        assert_eq!(nearest("baking", &known), Some("backing"));
        assert_eq!(nearest("zzzzzz", &known), None);
    }
}
