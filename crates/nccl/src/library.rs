//! The library: looked for once per process, refused with a reason where it cannot be used.

use std::{
    env,
    ffi::{CStr, OsString, c_char, c_int, c_void},
    fmt, ptr,
    sync::OnceLock,
};

use libloading::Library;

use crate::{
    error::{Code, NcclError},
    sys::{self, Entries, RawUniqueId, Symbols},
};

/// The oldest NCCL that can be used.
///
/// 2.18 has the configuration and the non-blocking communicators this crate is written for; older ones were not looked
/// at.
pub const MINIMUM: Version = Version(21_800);

/// Names a library to use instead of the ones that are looked for.
const VARIABLE: &str = "LONGSHORE_NCCL_LIB";
/// The second one comes with development packages only.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// NCCL, as found on this machine.
#[derive(Debug)]
pub struct Nccl {
    pub(crate) entries: Entries,
    version: Version,
    name: String,
}

impl Nccl {
    /// The library: the one that `LONGSHORE_NCCL_LIB` names, else `libnccl.so.2`, else `libnccl.so`. Looked for once.
    ///
    /// # Errors
    /// There is none, it is older than [`MINIMUM`], or it lacks an entry.
    pub fn load() -> Result<&'static Self, NcclError> {
        static LOADED: OnceLock<Result<Nccl, NcclError>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| {
            let named = env::var_os(VARIABLE).filter(|name| !name.is_empty());
            named.map_or_else(|| Self::open(NAMES.map(OsString::from)), |name| Self::open([name]))
        });
        loaded.as_ref().map_err(NcclError::clone)
    }

    /// Opens the first of `names` that there is.
    fn open(names: impl IntoIterator<Item = OsString>) -> Result<Self, NcclError> {
        let mut tried = Vec::new();
        for name in names {
            let shown = name.to_string_lossy().into_owned();
            // SAFETY: what is named is NCCL, by the system's search path or by whoever set the variable; its
            // initialisers have no preconditions
            match unsafe { Library::new(&name) } {
                Ok(library) => return Self::check(Loaded { library, name: shown, version: None }),
                Err(error) => tried.push(without_line_ends(&format!("{shown}: {error}"))),
            }
        }
        Err(NcclError::NotFound { tried: tried.join("; ") })
    }

    /// Checks the version first: of a library that is too old, it is not worth telling what it lacks.
    fn check(mut loaded: Loaded) -> Result<Self, NcclError> {
        let version = loaded.ask_version()?;
        if version < MINIMUM {
            return Err(NcclError::TooOld {
                library: loaded.name,
                found: version,
                minimum: MINIMUM,
            });
        }
        loaded.version = Some(version);
        // SAFETY: the library is NCCL, and is never unloaded, as it is forgotten below; its entries have the declared
        // signatures from the oldest version on that is let through
        let entries = unsafe { Entries::look_up(&loaded) }?;
        let Loaded { library, name, .. } = loaded;
        // threads of NCCL run on in it
        std::mem::forget(library);
        Ok(Self { entries, version, name })
    }

    /// A library made of functions of this process.
    #[cfg(test)]
    pub(crate) fn of(entries: Entries) -> Self {
        Self { entries, version: MINIMUM, name: "fake".to_owned() }
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The name it was loaded by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// An identifier for a new communicator. Works without a GPU.
    ///
    /// One process makes it and gives it to all ranks. That process has to live until all of them have joined: a thread
    /// of NCCL's in it introduces them to each other. Source: `bootstrapGetUniqueId` in `bootstrap.cc`, 2.30.7.
    ///
    /// # Errors
    /// NCCL found no network interface to use.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = RawUniqueId([0; 128]);
        // SAFETY: `id` is there to be written to
        let code = unsafe { (self.entries.get_unique_id)(&raw mut id) };
        self.check_code("ncclGetUniqueId", code)?;
        Ok(UniqueId(id.0))
    }

    /// An error unless `code` is success.
    pub(crate) fn check_code(&self, call: &'static str, code: c_int) -> Result<(), NcclError> {
        if code == sys::SUCCESS {
            return Ok(());
        }
        Err(self.error(call, code))
    }

    /// What `call` returned as an error, with NCCL's texts: they belong to the last error of the process.
    pub(crate) fn error(&self, call: &'static str, code: c_int) -> NcclError {
        // SAFETY: takes any number
        let meaning = self.entries.get_error_string.map(|entry| unsafe { entry(code) });
        // SAFETY: the communicator is unused and may be null (nccl.h)
        let last = self.entries.get_last_error.map(|entry| unsafe { entry(ptr::null_mut()) });
        let detail = [meaning, last].into_iter().flatten().filter_map(|text| {
            // SAFETY: null, or a string of the library's that it never frees
            let text = unsafe { owned(text) }?;
            Some(format!(": {text}"))
        });
        NcclError::Nccl { call, code: Code(code), detail: detail.collect() }
    }
}

/// `text` on one line; `None` for null and for nothing.
///
/// # Safety
/// `text` is null or a string that ends.
unsafe fn owned(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not null, and by the caller's word a string that ends
    let text = unsafe { CStr::from_ptr(text) };
    Some(without_line_ends(&text.to_string_lossy())).filter(|text| !text.is_empty())
}

fn without_line_ends(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(", ")
}

/// A library that has been opened and may be NCCL.
struct Loaded {
    library: Library,
    name: String,
    version: Option<Version>,
}

impl Loaded {
    fn ask_version(&self) -> Result<Version, NcclError> {
        type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;

        let name = c"ncclGetVersion";
        let address = self.address(name).ok_or_else(|| self.missing(name))?;
        // SAFETY: not null, and in every version of NCCL a function with this signature
        let get_version = unsafe { std::mem::transmute::<*mut c_void, GetVersion>(address) };
        let mut version = 0;
        // SAFETY: `version` is there to be written to
        let code = unsafe { get_version(&raw mut version) };
        match u32::try_from(version) {
            Ok(version) if code == sys::SUCCESS => Ok(Version(version)),
            _ => Err(NcclError::Nccl {
                call: "ncclGetVersion",
                code: Code(code),
                detail: format!(": {} gives its version as {version}", self.name),
            }),
        }
    }
}

impl Symbols for Loaded {
    fn address(&self, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: only the address is taken, whatever it is of
        let symbol = unsafe { self.library.get::<*mut c_void>(name.to_bytes_with_nul()) };
        symbol.ok().map(|symbol| *symbol).filter(|address| !address.is_null())
    }

    fn missing(&self, name: &CStr) -> NcclError {
        NcclError::MissingSymbol {
            library: self.name.clone(),
            version: self
                .version
                .map_or("no version".to_owned(), |version| format!("NCCL {version}")),
            symbol: name.to_string_lossy().into_owned(),
        }
    }
}

/// A version of NCCL: `NCCL_VERSION_CODE`, 10 000 for a major version, 100 for a minor one (since 2.9; `nccl.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // 2.8 and before: 1 000 for a major version
        let major = if self.0 < 10_000 { 1_000 } else { 10_000 };
        write!(f, "{}.{}.{}", self.0 / major, self.0 % major / 100, self.0 % 100)
    }
}

/// Names a communicator that is to be joined. Whoever has it can join: it is shown to nobody.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId(pub [u8; 128]);

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_nccl_writes_them() {
        assert_eq!(Version(21_803).to_string(), "2.18.3");
        assert_eq!(Version(22_907).to_string(), "2.29.7");
        assert_eq!(Version(2_804).to_string(), "2.8.4");
    }

    /// Every name that was tried is told, on one line.
    #[test]
    fn no_library_is_an_ordinary_error() {
        let error = Nccl::open(["libno-such-nccl.so.2", "libno-such-nccl.so"].map(OsString::from));
        let text = error.unwrap_err().to_string();
        assert!(text.starts_with("no NCCL library: libno-such-nccl.so.2: "), "{text}");
        assert!(text.contains("; libno-such-nccl.so: "), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }

    /// A library that is there and is something else says what it lacks.
    #[test]
    fn another_library_is_refused_by_what_it_lacks() {
        let error = Nccl::open([OsString::from("libc.so.6")]).unwrap_err();
        assert_eq!(error.to_string(), "libc.so.6 (no version) has no ncclGetVersion");
    }

    #[test]
    fn texts_of_the_library_are_put_on_one_line() {
        assert_eq!(without_line_ends("\nfirst \n\n second\n"), "first, second");
    }
}
