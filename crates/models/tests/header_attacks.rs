//! One test for each way a header can lie, and random damage: an error that names the culprit, never a panic.

#![allow(clippy::panic, reason = "test code: a panic is the verdict")]

use longshore_models::{
    checkpoint::{Checkpoint, CheckpointFile},
    header::{HEADER_BYTES_MAX, header_bytes, parse_header},
    index::Index,
};
use proptest::prelude::*;

/// The message of the refusal; fails when the header is accepted.
fn refusal(json: &str, data_bytes: u64) -> String {
    match parse_header("f.safetensors", json.as_bytes(), data_bytes) {
        Ok(entries) => panic!("accepted {json}: {entries:?}"),
        Err(e) => e.to_string(),
    }
}

#[track_caller]
fn names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

#[test]
fn length_word_is_checked_against_the_file() {
    assert_eq!(header_bytes("f", &10u64.to_le_bytes(), 18).unwrap(), 10);
    let e = header_bytes("f", &11u64.to_le_bytes(), 18).unwrap_err().to_string();
    names(&e, &["f: ", "11", "18"]);
    let huge = (1u64 << 63) + 5;
    let e = header_bytes("f", &huge.to_le_bytes(), 1 << 40).unwrap_err().to_string();
    names(&e, &[&huge.to_string(), &HEADER_BYTES_MAX.to_string()]);
    names(&header_bytes("f", &[1, 2, 3], 3).unwrap_err().to_string(), &["f: ", "3 bytes"]);
}

#[test]
fn valid_headers_are_accepted_in_file_order() {
    let json = r#"{"b":{"dtype":"F32","shape":[2],"data_offsets":[2,10]},"__metadata__":{"format":"pt"},
        "a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},"empty":{"dtype":"U8","shape":[0],"data_offsets":[10,10]}}"#;
    let entries = parse_header("f", json.as_bytes(), 10).unwrap();
    let order: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(order, ["a", "b", "empty"]);
}

#[test]
fn duplicate_names_are_refused() {
    let entry = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    names(
        &refusal(&format!(r#"{{"w":{entry},"w":{entry}}}"#), 1),
        &["f.safetensors", "w", "twice"],
    );
}

#[test]
fn overlaps_are_refused_with_both_names() {
    let json = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}}"#;
    names(&refusal(json, 7), &["a", "b", "3", "4"]);
}

#[test]
fn holes_are_refused_at_the_start_between_and_at_the_end() {
    let tensor = |a: u64, b: u64| {
        format!(r#"{{"dtype":"U8","shape":[{}],"data_offsets":[{a},{b}]}}"#, b - a)
    };
    names(&refusal(&format!(r#"{{"w":{}}}"#, tensor(1, 3)), 3), &["w", "hole", "1"]);
    let json = format!(r#"{{"v":{},"w":{}}}"#, tensor(0, 2), tensor(4, 6));
    names(&refusal(&json, 6), &["w", "4", "2"]);
    names(&refusal(&format!(r#"{{"w":{}}}"#, tensor(0, 3)), 9), &["w", "3", "9"]);
}

#[test]
fn a_file_shorter_than_its_header_says_is_refused() {
    let json = r#"{"w":{"dtype":"U8","shape":[100],"data_offsets":[0,100]}}"#;
    names(&refusal(json, 60), &["w", "100", "60"]);
}

#[test]
fn sizes_that_overflow_or_disagree_are_refused() {
    let json = r#"{"w":{"dtype":"BF16","shape":[4294967296,4294967296],"data_offsets":[0,18446744073709551615]}}"#;
    names(&refusal(json, 10), &["w", "4294967296", "overflow"]);
    let json = r#"{"w":{"dtype":"BF16","shape":[3],"data_offsets":[0,5]}}"#;
    names(&refusal(json, 5), &["w", "6 bytes", "5"]);
    let json = r#"{"w":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#;
    names(&refusal(json, 2), &["w"]);
    let json = r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[5,4]}}"#;
    names(&refusal(json, 5), &["w", "backwards"]);
}

#[test]
fn what_is_not_a_header_is_refused() {
    for json in [
        "",
        "{",
        "[]",
        "null",
        "{\"w\":1}",
        "{\"w\":{}}",
        r#"{"w":{"dtype":"U7","shape":[1],"data_offsets":[0,1]}}"#,
        r#"{"w":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#,
        r#"{"w":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}}"#,
        r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}"#,
        r#"{"__metadata__":{"a":1}}"#,
    ] {
        names(&refusal(json, 1), &["f.safetensors"]);
    }
    let deep = "[".repeat(100_000);
    names(&refusal(&format!("{{\"w\":{deep}"), 1), &["f.safetensors"]);
}

#[test]
fn index_entries_stay_in_the_directory() {
    for bad in ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b"] {
        let json = serde_json::json!({"weight_map": {"w": bad}}).to_string();
        names(&Index::parse(json.as_bytes()).unwrap_err().to_string(), &["w", "plain file name"]);
    }
    assert!(Index::parse(b"{}").is_err() && Index::parse(b"{\"weight_map\":{}}").is_err());
}

/// Two entries for one tensor must not make up for a tensor without any.
#[test]
fn a_tensor_that_stands_twice_in_the_index_is_named() {
    let json = br#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                    "v":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    let file = |bytes| CheckpointFile { name: "f.safetensors".into(), bytes, header_bytes: 8 };
    let headers = vec![(file(10), parse_header("f.safetensors", json, 2).unwrap())];
    for (map, named) in [
        (r#"{"w":"f.safetensors","w":"f.safetensors"}"#, ["w", "stands twice"]),
        (r#"{"w":"f.safetensors"}"#, ["v", "not listed"]),
        (r#"{"w":"f.safetensors","v":"f.safetensors","x":"f.safetensors"}"#, ["x", "not list it"]),
    ] {
        let index = Index::parse(format!("{{\"weight_map\":{map}}}").as_bytes()).unwrap();
        let refused = Checkpoint::new(headers.clone(), Some(&index)).unwrap_err();
        names(&refused.to_string(), &named);
    }
}

proptest! {
    /// Whatever bytes come, the parser answers; what it accepts tiles the data section and fits the file.
    #[test]
    fn random_damage_never_panics_and_never_passes_lies(
        flips in proptest::collection::vec((0usize..400, any::<u8>()), 0..6),
        data_bytes in 0u64..40,
    ) {
        let mut json = br#"{"a":{"dtype":"BF16","shape":[3,2],"data_offsets":[0,12]},"b":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[12,16]},"c":{"dtype":"F32","shape":[],"data_offsets":[16,20]}}"#.to_vec();
        for (at, value) in flips {
            let at = at % json.len();
            json[at] = value;
        }
        if let Ok(entries) = parse_header("f", &json, data_bytes) {
            let mut at = 0;
            for e in &entries {
                prop_assert_eq!(e.data_offsets.start, at);
                at = e.data_offsets.end;
            }
            prop_assert_eq!(at, data_bytes);
            let file = CheckpointFile { name: "f".into(), bytes: 8 + json.len() as u64 + at, header_bytes: 8 };
            prop_assert!(Checkpoint::new(vec![(file, entries)], None).is_ok());
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(json in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_header("f", &json, 10);
        let _ = Index::parse(&json);
        let _ = header_bytes("f", &json, json.len() as u64);
    }
}
