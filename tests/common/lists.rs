//! Exclude lists, read naively from the configuration files: what the loader's own matcher is held against.
//!
//! Written from reference §1.6 and §2.6 alone; slow and plain. Fused names are not known here, as no published list has
//! any.

use std::{fs, path::Path};

use serde_json::Value;

/// What the configuration files of a checkpoint leave unquantised.
pub(crate) struct Lists {
    method: Method,
    entries: Vec<String>,
    /// Whether an FP8 KV cache is declared.
    pub(crate) kv_cache_fp8: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    None,
    Fp8,
    ModelOpt,
    Quark,
    CompressedTensors,
}

impl Lists {
    pub(crate) fn read(dir: &Path) -> Lists {
        let json = |name: &str| -> Value {
            fs::read(dir.join(name)).map_or(Value::Null, |t| serde_json::from_slice(&t).unwrap())
        };
        let (config, beside) = (json("config.json"), json("hf_quant_config.json"));
        let places = [
            &config["quantization_config"],
            &config["text_config"]["quantization_config"],
            &config["compression_config"],
            &beside["quantization"],
        ];
        let block = places.into_iter().find(|b| b.is_object()).cloned().unwrap_or_default();
        let method = match block["quant_method"].as_str() {
            Some("fp8") => Method::Fp8,
            Some("quark") => Method::Quark,
            Some("compressed-tensors") => Method::CompressedTensors,
            _ if block["quant_algo"].is_string() => Method::ModelOpt,
            _ => Method::None,
        };
        let keys =
            ["ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules", "exclude"];
        let list = keys.iter().find_map(|key| block[*key].as_array()).cloned().unwrap_or_default();
        let kv = block["kv_cache_quant_algo"] == "FP8"
            || block["kv_cache_scheme"]["num_bits"] == 8
                && block["kv_cache_scheme"]["type"] == "float";
        Lists {
            method,
            entries: list.iter().map(|e| e.as_str().unwrap().to_owned()).collect(),
            kv_cache_fp8: kv,
        }
    }

    /// Whether the linear layer `module` is quantised.
    pub(crate) fn quantises(&self, module: &str) -> bool {
        self.method != Method::None && !self.entries.iter().any(|entry| self.names(entry, module))
    }

    fn names(&self, entry: &str, module: &str) -> bool {
        let entry = match entry.strip_prefix("language_model.layers.") {
            Some(rest) => format!("language_model.model.layers.{rest}"),
            None => entry.to_owned(),
        };
        let inner = module.strip_prefix("language_model.").unwrap_or(module);
        [module, inner].into_iter().any(|name| match self.method {
            Method::None => false,
            Method::Fp8 => is_run(entry.strip_prefix("model.").unwrap_or(&entry), name),
            Method::ModelOpt => {
                is_run(&entry, name)
                    || glob(entry.as_bytes(), name.as_bytes())
                    || name.split('.').any(|part| glob(entry.as_bytes(), part.as_bytes()))
            }
            Method::Quark => match entry.strip_prefix("re:") {
                Some(regex) => regex_matches(regex, name),
                None => entry == name,
            },
            Method::CompressedTensors => match entry.strip_prefix("re:") {
                Some(regex) => regex_matches(regex, name),
                None => name.to_lowercase().contains(&entry.to_lowercase()),
            },
        })
    }
}

/// Whether the segments of `entry` stand in a row in `name`.
fn is_run(entry: &str, name: &str) -> bool {
    let entry: Vec<&str> = entry.split('.').collect();
    let name: Vec<&str> = name.split('.').collect();
    name.windows(entry.len()).any(|run| run == entry)
}

fn glob(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((b'*', rest)) => (0..=name.len()).any(|skip| glob(rest, &name[skip..])),
        Some((byte, rest)) => {
            name.split_first().is_some_and(|(n, more)| n == byte && glob(rest, more))
        }
    }
}

/// A backtracking matcher of the few constructs that published lists use, anchored at the start.
fn regex_matches(regex: &str, name: &str) -> bool {
    let mut at = 0;
    let parsed = alternatives(regex.as_bytes(), &mut at);
    assert_eq!(at, regex.len(), "a construct of {regex} is not known here");
    any_of(&parsed, name.as_bytes(), &mut |_| true)
}

enum Atom {
    Byte(u8),
    Digit,
    Any,
    End,
    Group(Vec<Sequence>),
}

/// Atoms with the least and the most times that each stands there.
type Sequence = Vec<(Atom, usize, usize)>;

fn alternatives(regex: &[u8], at: &mut usize) -> Vec<Sequence> {
    let mut all = vec![Sequence::new()];
    while let Some(&byte) = regex.get(*at).filter(|byte| **byte != b')') {
        *at += 1;
        let atom = match byte {
            b'|' => {
                all.push(Sequence::new());
                continue;
            }
            b'(' => {
                let inner = alternatives(regex, at);
                *at += 1;
                Atom::Group(inner)
            }
            b'.' => Atom::Any,
            b'$' => Atom::End,
            b'\\' => {
                *at += 1;
                match regex[*at - 1] {
                    b'd' => Atom::Digit,
                    b'.' => Atom::Byte(b'.'),
                    other => panic!("\\{} is not known here", other as char),
                }
            }
            b'[' | b'{' | b'?' | b'^' => panic!("{} is not known here", byte as char),
            _ => Atom::Byte(byte),
        };
        let (least, most) = match regex.get(*at) {
            Some(b'*') => (0, usize::MAX),
            Some(b'+') => (1, usize::MAX),
            _ => (1, 1),
        };
        *at += usize::from((least, most) != (1, 1));
        all.last_mut().unwrap().push((atom, least, most));
    }
    all
}

type Then<'a> = &'a mut dyn FnMut(&[u8]) -> bool;

fn any_of(all: &[Sequence], name: &[u8], then: Then<'_>) -> bool {
    all.iter().any(|sequence| in_row(sequence, name, then))
}

fn in_row(sequence: &[(Atom, usize, usize)], name: &[u8], then: Then<'_>) -> bool {
    let Some(((atom, least, most), rest)) = sequence.split_first() else {
        return then(name);
    };
    repeated(atom, *least, *most, name, &mut |left| in_row(rest, left, then))
}

fn repeated(atom: &Atom, least: usize, most: usize, name: &[u8], then: Then<'_>) -> bool {
    if least == 0 && then(name) {
        return true;
    }
    let again = &mut |left: &[u8]| {
        // what matches nothing must not be repeated forever
        let moved = left.len() < name.len();
        if moved {
            repeated(atom, least.saturating_sub(1), most - 1, left, then)
        } else {
            then(left)
        }
    };
    most > 0 && once(atom, name, again)
}

fn once(atom: &Atom, name: &[u8], then: Then<'_>) -> bool {
    let first = |fits: &dyn Fn(u8) -> bool| name.split_first().filter(|(b, _)| fits(**b));
    match atom {
        Atom::Group(all) => any_of(all, name, then),
        Atom::End => name.is_empty() && then(name),
        Atom::Any => first(&|_| true).is_some_and(|(_, left)| then(left)),
        Atom::Digit => first(&|b| b.is_ascii_digit()).is_some_and(|(_, left)| then(left)),
        Atom::Byte(byte) => first(&|b| b == *byte).is_some_and(|(_, left)| then(left)),
    }
}
