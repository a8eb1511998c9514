//! Bytes → length word, header, index, configuration. Nothing may panic, hang or allocate without bound.

#![no_main]

use libfuzzer_sys::fuzz_target;
use longshore_models::{
    config::Config,
    header::{header_bytes, parse_header},
    index::Index,
    quant::Declared,
};

fuzz_target!(|data: &[u8]| {
    let _ = header_bytes("f", data, data.len() as u64);
    let _ = Index::parse(data);
    if let Ok(config) = Config::parse("config.json", data) {
        let _ = Declared::new(&config, Some(&config), None);
    }
    if let Some((first, json)) = data.split_first() {
        if let Ok(entries) = parse_header("f", json, u64::from(*first)) {
            let end = entries.last().map_or(0, |e| e.data_offsets.end);
            assert_eq!(end, u64::from(*first), "an accepted header tiles the data section");
        }
    }
});
