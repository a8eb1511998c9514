//! Where a checkpoint comes from: a directory, or a synthetic one made on first use.

use std::path::PathBuf;

use crate::{
    cache::{self, weights::KeepWeights},
    error::LoadError,
    origin::Origin,
    synth::{Scale, Synth},
};

/// Finds out where the checkpoint is that the user named: a directory, `synth:FAMILY-SCHEME`, object storage, or a model of the
/// Hugging Face hub. Told apart here and nowhere else.
///
/// `synth:FAMILY-SCHEME` is written to the cache directory ([`cache::directory`], `/synth`) unless it is there already. What will be
/// read of weights that are elsewhere is kept where `keep` says.
///
/// # Errors
/// None of these, or it cannot be reached; or the directory of what is kept cannot be written.
pub fn resolve(given: &str, keep: Option<&KeepWeights>) -> Result<Origin, LoadError> {
    find(given, false, keep)
}

/// [`resolve`], for a load that reads from local storage in any case: what is elsewhere is copied to the cache directory first,
/// unless it is there in its present state.
///
/// # Errors
/// As [`resolve`].
pub fn download(given: &str) -> Result<Origin, LoadError> {
    find(given, true, None)
}

fn find(given: &str, download: bool, keep: Option<&KeepWeights>) -> Result<Origin, LoadError> {
    let refuse = |reason: &str| LoadError::Source { given: given.into(), reason: reason.into() };
    if let Some(model) = given.strip_prefix("synth:") {
        return synthetic(given, model).map(Origin::from);
    }
    let path = PathBuf::from(given);
    if path.is_dir() {
        return Ok(path.into());
    }
    if path.exists() {
        return Err(refuse("not a directory; give the directory that holds config.json"));
    }
    match elsewhere(given, download, keep)? {
        Some(origin) => Ok(origin),
        None => Err(refuse(
            "no such directory; expected one, s3://, gs://, az://, org/name of the Hugging Face hub, or synth:FAMILY-SCHEME",
        )),
    }
}

#[cfg(feature = "remote")]
fn elsewhere(
    given: &str,
    download: bool,
    keep: Option<&KeepWeights>,
) -> Result<Option<Origin>, LoadError> {
    let location = longshore_store::Location::parse(given)?;
    location.map(|location| crate::remote::open(&location, download, keep)).transpose()
}

#[cfg(not(feature = "remote"))]
fn elsewhere(
    given: &str,
    _download: bool,
    _keep: Option<&KeepWeights>,
) -> Result<Option<Origin>, LoadError> {
    match given.contains("://") {
        false => Ok(None),
        true => Err(LoadError::Source {
            given: given.into(),
            reason: "this program was built without object storage (feature remote)".into(),
        }),
    }
}

fn synthetic(given: &str, model: &str) -> Result<PathBuf, LoadError> {
    let refuse = |reason: String| LoadError::Source { given: given.into(), reason };
    let (family, scheme) = model.rsplit_once('-').ok_or_else(|| {
        refuse("expected synth:FAMILY-SCHEME, for example synth:llama-bf16".into())
    })?;
    let synth = Synth::new(family, scheme).scale(Scale::Tiny);
    let fingerprint = synth.fingerprint()?;
    // the fingerprint keeps a checkpoint of an older generator from being taken for this one's
    let target = cache::directory()?.join(format!("synth/{model}-{fingerprint}"));
    if target.is_dir() {
        return Ok(target);
    }
    // written aside and renamed: a second process, or an interruption, never sees half of it
    let aside = target.with_extension(format!("{}.tmp", std::process::id()));
    synth.write(&aside)?;
    match std::fs::rename(&aside, &target) {
        Ok(()) => Ok(target),
        Err(_) if target.is_dir() => {
            // another process was faster; ours is not needed
            let _ = std::fs::remove_dir_all(&aside);
            Ok(target)
        }
        Err(source) => Err(LoadError::Io { path: target, action: "renaming", source }),
    }
}
