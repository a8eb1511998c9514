//! Pages of a list: the same in all dialects.

use crate::content::{Object, Tree};

/// What is listed.
pub(crate) struct Query<'a> {
    pub(crate) prefix: &'a str,
    /// Names that are alike up to the next one of these after the prefix are one entry.
    pub(crate) delimiter: &'a str,
    /// Only what comes after this entry of the list.
    pub(crate) after: Option<&'a str>,
    /// Only what comes after this or is equal.
    pub(crate) from: Option<&'a str>,
    pub(crate) entries_max: usize,
}

/// Part of a list.
pub(crate) struct Page {
    pub(crate) objects: Vec<(String, Object)>,
    pub(crate) prefixes: Vec<String>,
    /// The last entry, if there are more.
    pub(crate) next: Option<String>,
}

/// The next page of a list.
pub(crate) fn page(tree: &Tree, query: &Query<'_>) -> Page {
    let mut page = Page { objects: Vec::new(), prefixes: Vec::new(), next: None };
    let mut last = String::new();
    for (name, object) in tree.list(query.prefix) {
        let prefix = common_prefix(&name, query);
        let entry = prefix.unwrap_or(&name);
        let before = query.after.is_some_and(|after| entry <= after)
            || query.from.is_some_and(|from| entry < from);
        if before || page.prefixes.last().is_some_and(|known| known == entry) {
            continue;
        }
        if page.objects.len() + page.prefixes.len() == query.entries_max {
            page.next = Some(last);
            break;
        }
        entry.clone_into(&mut last);
        match prefix {
            Some(prefix) => page.prefixes.push(prefix.to_owned()),
            None => page.objects.push((name, object)),
        }
    }
    page
}

/// The name up to the first delimiter after the prefix, and with it.
fn common_prefix<'a>(name: &'a str, query: &Query<'_>) -> Option<&'a str> {
    let start = query.prefix.len();
    if query.delimiter.is_empty() {
        return None;
    }
    let end = name.get(start..)?.find(query.delimiter)?;
    name.get(..start + end + query.delimiter.len())
}

/// A name as a token that clients hand back: hexadecimal, so that nobody reads it.
pub(crate) fn token(name: &str) -> String {
    name.bytes().map(|byte| format!("{byte:02x}")).collect()
}

/// The name of a token.
pub(crate) fn named(token: &str) -> Option<String> {
    let digits = |i: usize| u8::from_str_radix(token.get(2 * i..2 * i + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..token.len() / 2).map(digits).collect();
    bytes.and_then(|bytes| String::from_utf8(bytes).ok())
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::content::Content;

    /// Pages of every size have the same entries together, and none has more than it may.
    #[test]
    fn pages_together_are_the_list() {
        let content = Content::default();
        let tree = content.current("models");
        for name in ["a", "b/1", "b/2", "b/c/3", "c", "d/4"] {
            tree.give(name, |given| given.content = Some(("".into(), UNIX_EPOCH)));
        }
        let entries = |prefix: &str, delimiter: &str, entries_max: usize| {
            let (mut entries, mut after): (Vec<String>, Option<String>) = (Vec::new(), None);
            loop {
                let after_name = after.as_deref();
                let query = Query { prefix, delimiter, after: after_name, from: None, entries_max };
                let Page { objects, prefixes, next } = page(&tree, &query);
                assert!(objects.len() + prefixes.len() <= entries_max);
                entries.extend(objects.into_iter().map(|(name, _)| name));
                entries.extend(prefixes);
                match next {
                    Some(next) => after = Some(named(&token(&next)).unwrap()),
                    None => break,
                }
            }
            entries.sort();
            entries
        };
        for entries_max in 1..8 {
            assert_eq!(entries("", "/", entries_max), ["a", "b/", "c", "d/"]);
            assert_eq!(entries("b/", "/", entries_max), ["b/1", "b/2", "b/c/"]);
            assert_eq!(entries("b/", "", entries_max), ["b/1", "b/2", "b/c/3"]);
            assert_eq!(entries("e", "/", entries_max), Vec::<String>::new());
        }
    }
}
