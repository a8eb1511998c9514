//! What huggingface_hub keeps on this machine: the token, and models that were downloaded before.
//!
//! **Source:** huggingface_hub 1.0, `constants.py` (places), `utils/_auth.py` (token), "Understand caching" (layout).

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    location::{Location, MAIN, Service},
    options::Settings,
};

/// Where huggingface_hub keeps its things.
fn home(settings: &Settings) -> Option<PathBuf> {
    if let Some(home) = settings.get("HF_HOME") {
        return Some(home.into());
    }
    let cache = settings.get("XDG_CACHE_HOME").map(PathBuf::from);
    Some(
        cache
            .or_else(|| Some(Path::new(settings.get("HOME")?).join(".cache")))?
            .join("huggingface"),
    )
}

/// The directory of a local copy of a model of the hub, if there is one and it is complete: the revision is known, every
/// file that an index of weights names is there, and without an index all of a numbered series, or any weights at all.
pub fn hub_snapshot(location: &Location, settings: &Settings) -> Option<PathBuf> {
    if location.service() != Service::Hub {
        return None;
    }
    let hub = match settings.first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]) {
        Some((_, hub)) => PathBuf::from(hub),
        None => home(settings)?.join("hub"),
    };
    let model = hub.join(format!("models--{}", location.container().replace('/', "--")));
    let revision = location.revision().unwrap_or(MAIN);
    let commit = fs::read_to_string(model.join("refs").join(revision));
    let commit = commit.map_or_else(|_| revision.to_owned(), |text| text.trim().to_owned());
    // a commit is its digits, and nothing that leads out of the directory
    if commit.is_empty() || !commit.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let snapshot = model.join("snapshots").join(commit);
    is_complete(&snapshot).then_some(snapshot)
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn is_complete(snapshot: &Path) -> bool {
    let Ok(entries) = fs::read_dir(snapshot) else { return false };
    // links whose target is missing are files that were not downloaded in full
    let names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| snapshot.join(name).exists())
        .collect();
    if !names.iter().any(|name| name == "config.json") {
        return false;
    }
    let there = |name: &str| names.iter().any(|known| known == name);
    let indices: Vec<&String> =
        names.iter().filter(|name| name.ends_with(".safetensors.index.json")).collect();
    if indices.is_empty() {
        let mut weights = names.iter().filter(|name| name.ends_with(".safetensors")).peekable();
        return weights.peek().is_some()
            && weights.all(|name| series(name).iter().all(|name| there(name)));
    }
    indices.iter().all(|index| {
        let text = fs::read(snapshot.join(index)).unwrap_or_default();
        serde_json::from_slice::<Index>(&text)
            .is_ok_and(|index| index.weight_map.values().all(|name| there(name)))
    })
}

/// All names of the series that `model-00002-of-00007.safetensors` is of; none for a name that is not numbered.
fn series(name: &str) -> Vec<String> {
    let parse = || -> Option<(&str, usize, usize)> {
        let (rest, total) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        number.parse::<u32>().ok()?;
        Some((stem, number.len(), total.parse().ok().filter(|total| *total < 100_000)?))
    };
    let Some((stem, digits, total)) = parse() else { return Vec::new() };
    (1..=total)
        .map(|number| format!("{stem}-{number:0digits$}-of-{total:0digits$}.safetensors"))
        .collect()
}

/// Whether a switch of huggingface_hub is on.
pub(super) fn is_on(settings: &Settings, name: &str) -> bool {
    settings.get(name).is_some_and(|value| {
        matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
    })
}

/// The token that the user gave, or has on this machine.
pub(super) fn token(settings: &Settings) -> Result<Option<String>, String> {
    let given = settings.first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]);
    let (name, text) = match given {
        Some((name, text)) => (name.to_owned(), text.to_owned()),
        None => {
            if is_on(settings, "HF_HUB_DISABLE_IMPLICIT_TOKEN") {
                return Ok(None);
            }
            let named = settings.get("HF_TOKEN_PATH").map(PathBuf::from);
            let Some(path) = named.or_else(|| Some(home(settings)?.join("token"))) else {
                return Ok(None);
            };
            match fs::read_to_string(&path) {
                Ok(text) => (path.display().to_string(), text),
                Err(error)
                    if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
                {
                    return Ok(None);
                }
                Err(error) => return Err(format!("{}: {error}", path.display())),
            }
        }
    };
    let token = text.trim();
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!("{name} holds no token: it has characters that no token has"));
    }
    Ok(Some(token.to_owned()).filter(|token| !token.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(files: &[(&str, &str)]) -> (tempfile::TempDir, Settings) {
        let home = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = home.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let settings = [("HF_HOME".to_owned(), home.path().to_str().unwrap().to_owned())]
            .into_iter()
            .collect();
        (home, settings)
    }

    fn snapshot(files: &[(&str, &str)], text: &str) -> Option<String> {
        let (home, settings) = cache(files);
        let location = Location::parse(text).unwrap().unwrap();
        let found = hub_snapshot(&location, &settings)?;
        Some(found.strip_prefix(home.path()).unwrap().to_str().unwrap().to_owned())
    }

    const MODEL: &str = "hub/models--org--name";

    #[test]
    fn a_complete_copy_is_found_by_branch_and_commit() {
        let (reference, config, weights) = (
            format!("{MODEL}/refs/main"),
            format!("{MODEL}/snapshots/abc1/config.json"),
            format!("{MODEL}/snapshots/abc1/model.safetensors"),
        );
        let files =
            [(reference.as_str(), "abc1\n"), (config.as_str(), "{}"), (weights.as_str(), "")];
        let found = Some(format!("{MODEL}/snapshots/abc1"));
        assert_eq!(snapshot(&files, "org/name"), found);
        assert_eq!(snapshot(&files, "org/name@abc1"), found);
        assert_eq!(snapshot(&files, "org/name@v2"), None);
        assert_eq!(snapshot(&files, "org/other"), None);
        assert_eq!(snapshot(&files[..2], "org/name"), None);
    }

    #[test]
    fn a_copy_is_complete_when_all_that_its_index_names_is_there() {
        let at = |name: &str| format!("{MODEL}/snapshots/abc1/{name}");
        let (config, index, a, b) = (
            at("config.json"),
            at("model.safetensors.index.json"),
            at("a.safetensors"),
            at("b.safetensors"),
        );
        let map = r#"{"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#;
        let files =
            [(config.as_str(), "{}"), (index.as_str(), map), (a.as_str(), ""), (b.as_str(), "")];
        assert!(snapshot(&files, "org/name@abc1").is_some());
        assert_eq!(snapshot(&files[..3], "org/name@abc1"), None);
    }

    #[test]
    fn a_numbered_series_without_index_must_be_whole() {
        let at = |name: &str| format!("{MODEL}/snapshots/abc1/{name}");
        let (config, one, two) = (
            at("config.json"),
            at("m-00001-of-00002.safetensors"),
            at("m-00002-of-00002.safetensors"),
        );
        let files = [(config.as_str(), "{}"), (one.as_str(), ""), (two.as_str(), "")];
        assert!(snapshot(&files, "org/name@abc1").is_some());
        assert_eq!(snapshot(&files[..2], "org/name@abc1"), None);
    }

    #[test]
    fn the_token_is_the_users() {
        let (_home, settings) = cache(&[("token", "hf_file\n")]);
        assert_eq!(token(&settings), Ok(Some("hf_file".to_owned())));
        assert_eq!(token(&[("HF_TOKEN", "hf_env")].into()), Ok(Some("hf_env".to_owned())));
        let error = token(&[("HF_TOKEN", "hunter\u{1}2")].into()).unwrap_err();
        assert!(error.contains("HF_TOKEN") && !error.contains("hunter"));
        assert_eq!(token(&Settings::default()), Ok(None));
    }
}
