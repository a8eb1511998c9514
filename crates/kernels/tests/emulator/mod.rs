//! Compiles `cu/*.cu` for the host and runs its kernels there.

use std::{
    ffi::{CString, c_char, c_int, c_uint, c_void},
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, OnceLock, PoisonError},
};

use longshore_kernels::cuda::table::{ENTRIES, Grid, Kernel};

type Emulate = unsafe extern "C" fn(
    *const c_char,
    c_uint,
    c_uint,
    c_int,
    c_int,
    *const *const c_void,
) -> c_int;

/// The kernels as host code; one launch at a time.
pub(crate) struct Emulator {
    emulate: Mutex<Emulate>,
}

/// The order in which blocks and threads take their turns.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Turns {
    Forwards,
    Backwards,
}

/// Both of them.
pub(crate) const TURNS: [Turns; 2] = [Turns::Forwards, Turns::Backwards];

/// The emulator, or `None`, said aloud, where there is no C++ compiler.
pub(crate) fn emulator() -> Option<&'static Emulator> {
    static EMULATOR: OnceLock<Option<Emulator>> = OnceLock::new();
    let open = |library: PathBuf| {
        let emulator = Emulator::open(&library);
        // the mapping keeps what it needs
        fs::remove_dir_all(library.parent().unwrap()).unwrap();
        emulator
    };
    EMULATOR.get_or_init(|| compiled().map(open)).as_ref()
}

impl Emulator {
    fn open(library: &Path) -> Emulator {
        let path = CString::new(library.to_str().unwrap()).unwrap();
        // SAFETY: a library that was just made from this repository's sources; it has no initialisers.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null(), "{} does not load", library.display());
        // SAFETY: the handle is open and stays so.
        let symbol = unsafe { libc::dlsym(handle, c"emulate".as_ptr()) };
        assert!(!symbol.is_null(), "the library has no emulate");
        // SAFETY: `emulate` is defined below with this signature.
        let emulate = unsafe { std::mem::transmute::<*mut c_void, Emulate>(symbol) };
        Emulator { emulate: Mutex::new(emulate) }
    }

    /// Runs a kernel; addresses among its parameters are host addresses.
    pub(crate) fn launch<K: Kernel>(&self, kernel: &K, grid: Grid, turns: Turns) {
        let (entry, params) = (K::ENTRY, kernel.arguments());
        assert!(grid.threads <= entry.threads && grid.blocks > 0, "{}: {grid:?}", entry.name);
        assert_eq!(params.len(), entry.params.len(), "{}", entry.name);
        let name = CString::new(entry.name).unwrap();
        let emulate = self.emulate.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: parameters are as many and as large as the entry's, which the PTX confirms; that the addresses among
        // them are valid is what the tests are about.
        let outcome = unsafe {
            emulate(
                name.as_ptr(),
                grid.blocks,
                grid.threads,
                c_int::from(entry.synchronises),
                c_int::from(matches!(turns, Turns::Backwards)),
                params.as_ptr(),
            )
        };
        assert_eq!(outcome, 0, "{}: unknown, a divergent barrier or one unannounced", entry.name);
    }
}

/// The library, made anew by each process that tests.
fn compiled() -> Option<PathBuf> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    if Command::new(&compiler).arg("--version").output().is_err() {
        // past the capture of passing tests' output
        let mut aloud = std::io::stderr();
        writeln!(aloud, "ignored: no {compiler}, CUDA kernels not compared with their host twins")
            .unwrap();
        return None;
    }
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(std::process::id().to_string());
    fs::create_dir_all(&folder).unwrap();
    let (source, library) = (folder.join("kernels.cpp"), folder.join("kernels.so"));
    fs::write(&source, sources(kernels)).unwrap();
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-O1", "-g", "-fPIC", "-shared"])
        // one rounding per operation; bytes are read as words
        .args(["-ffp-contract=off", "-fno-strict-aliasing"])
        // an access that is not aligned ends the process
        .args(["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"])
        .arg("-I")
        .arg(kernels.join("cu"))
        .arg("-I")
        .arg(kernels.join("tests/emulator"))
        .arg(&source)
        .arg("-o")
        .arg(&library)
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    Some(library)
}

/// All kernels in one unit, and `emulate`.
fn sources(kernels: &Path) -> String {
    let mut text = "#include \"emulator.hpp\"\n".to_owned();
    let mut files: Vec<PathBuf> =
        fs::read_dir(kernels.join("cu")).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    for file in files.iter().filter(|file| file.extension().is_some_and(|e| e == "cu")) {
        writeln!(text, "#include \"{}\"", file.display()).unwrap();
    }
    text += "static const emulator::Kernel KERNELS[] = {\n";
    for entry in ENTRIES {
        writeln!(text, "    {{\"{0}\", emulator::invoke<{0}>}},", entry.name).unwrap();
    }
    text + r#"};

extern "C" int emulate(const char* name, unsigned blocks, unsigned threads, int synchronises, int backwards, void** params) {
    using namespace emulator;
    for (const Kernel& kernel : KERNELS) {
        if (std::strcmp(kernel.name, name) != 0) continue;
        gridDim.x = blocks;
        blockDim.x = threads;
        launch = {kernel.invoke, params, backwards != 0, synchronises != 0, Outcome::Done};
        run_grid();
        return static_cast<int>(launch.outcome);
    }
    return static_cast<int>(Outcome::UnknownKernel);
}
"#
}
