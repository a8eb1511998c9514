//! Makes the library: once per build tree, whichever of several test processes comes first.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, File},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

const CRATE: &str = env!("CARGO_MANIFEST_DIR");

/// How all units are compiled.
const FLAGS: [&str; 11] = [
    "-std=c++17",
    "-O2",
    "-g",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    // its longjmp refuses to change stacks
    "-U_FORTIFY_SOURCE",
    // one rounding per operation; bytes are read as words
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    // directives that only device compilers know
    "-Wno-unknown-pragmas",
];

/// How kernels are, too: an access that is not aligned traps.
const KERNEL_FLAGS: [&str; 2] = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"];

const LINK_FLAGS: [&str; 4] = ["-shared", "-pthread", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic"];

/// The directory that holds `libcuda.so.1` and `libcuda.so`, compiled unless `target_tmp` has it from before; `None`, said
/// on stderr past the capture of tests, where there is no C++ compiler (`$CXX`, or `g++`).
///
/// `target_tmp` is a directory of the build tree: `env!("CARGO_TARGET_TMPDIR")` in tests. Of several calls in a process the
/// first one decides.
///
/// # Panics
///
/// When the sources do not compile or the directory cannot be written.
pub fn library_dir(target_tmp: impl AsRef<Path>) -> Option<&'static Path> {
    static DIRECTORY: OnceLock<Option<PathBuf>> = OnceLock::new();
    DIRECTORY.get_or_init(|| make_library(target_tmp.as_ref())).as_deref()
}

#[expect(clippy::panic, reason = "a test says so by failing")]
fn make_library(target_tmp: &Path) -> Option<PathBuf> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    let Ok(version) = Command::new(&compiler).arg("--version").output() else {
        // past the capture of passing tests' output; nobody to tell where that is closed
        let _ = writeln!(io::stderr(), "ignored: no {compiler}, CUDA not emulated");
        return None;
    };
    let made = Sources::read().and_then(|sources| {
        let directory = target_tmp.join(format!("emulator-{:016x}", sources.key(&version.stdout)));
        compile_once(&compiler, &sources, &directory)?;
        Ok(directory)
    });
    match made {
        Ok(directory) => Some(directory),
        Err(error) => panic!("the emulated driver: {error}"),
    }
}

/// What the library is made of.
struct Sources {
    /// Of `cpp/` and `cu/`, in the order of their names.
    files: Vec<(PathBuf, Vec<u8>)>,
    /// The unit that holds all kernels.
    kernels: String,
}

impl Sources {
    fn read() -> io::Result<Sources> {
        let mut files = Vec::new();
        for folder in [Path::new(CRATE).join("cpp"), Path::new(CRATE).join("../kernels/cu")] {
            let mut paths = fs::read_dir(folder)?
                .map(|file| Ok(file?.path()))
                .collect::<io::Result<Vec<_>>>()?;
            paths.sort();
            for path in paths {
                let text = fs::read(&path)?;
                files.push((path, text));
            }
        }
        let kernels = kernel_unit(&files);
        Ok(Sources { files, kernels })
    }

    fn key(&self, compiler_version: &[u8]) -> u64 {
        let mut hasher = DefaultHasher::new();
        (FLAGS, KERNEL_FLAGS, LINK_FLAGS, compiler_version).hash(&mut hasher);
        (&self.files, &self.kernels).hash(&mut hasher);
        hasher.finish()
    }

    fn named(&self, extension: &str) -> impl Iterator<Item = &Path> {
        let wanted = move |path: &&Path| path.extension() == Some(OsStr::new(extension));
        self.files.iter().map(|(path, _)| path.as_path()).filter(wanted)
    }
}

/// All `.cu` files in one unit, and the table of their kernels.
fn kernel_unit(files: &[(PathBuf, Vec<u8>)]) -> String {
    let (mut unit, mut table) = ("#include \"device.hpp\"\n".to_owned(), String::new());
    for (path, text) in files {
        if path.extension() != Some(OsStr::new("cu")) {
            continue;
        }
        // writing to a string does not fail
        let _ = writeln!(unit, "#include \"{}\"", path.display());
        for name in kernel_names(&String::from_utf8_lossy(text)) {
            let _ = writeln!(table, "    kernel_of<{name}>(\"{name}\"),");
        }
    }
    unit + "const emulator::Kernel emulator::KERNELS[] = {\n"
        + &table
        + "};\nconst size_t emulator::KERNEL_COUNT = sizeof KERNELS / sizeof *KERNELS;\n"
}

/// The names that follow `extern "C" __global__ void`, behind launch bounds or not.
fn kernel_names(text: &str) -> impl Iterator<Item = &str> {
    let declarations = text.split("extern \"C\" __global__ void").skip(1);
    declarations.filter_map(|rest| {
        let rest = rest.trim_start();
        let bounded = rest.strip_prefix("__launch_bounds__").and_then(|rest| rest.split_once(')'));
        bounded.map_or(rest, |(_, rest)| rest.trim_start()).split_once('(').map(|(name, _)| name)
    })
}

/// Leaves a complete directory, made by this process or by one that was quicker.
fn compile_once(compiler: &str, sources: &Sources, directory: &Path) -> io::Result<()> {
    if directory.exists() {
        return Ok(());
    }
    if let Some(parent) = directory.parent() {
        fs::create_dir_all(parent)?;
    }
    let lock = File::create(directory.with_extension("lock"))?;
    lock.lock()?;
    if directory.exists() {
        return Ok(());
    }
    let unfinished = directory.with_extension(std::process::id().to_string());
    fs::create_dir_all(&unfinished)?;
    compile(compiler, sources, &unfinished)?;
    fs::rename(&unfinished, directory)
}

fn compile(compiler: &str, sources: &Sources, directory: &Path) -> io::Result<()> {
    let kernels = directory.join("kernels.cpp");
    fs::write(&kernels, &sources.kernels)?;
    let units = || std::iter::once((kernels.as_path(), true)).chain(driver_units(sources));
    let mut running: Vec<Child> = Vec::new();
    for (unit, is_kernels) in units() {
        let mut command = Command::new(compiler);
        command.args(FLAGS).args(if is_kernels { &KERNEL_FLAGS[..] } else { &[] });
        command.arg("-I").arg(Path::new(CRATE).join("cpp")).arg("-c").arg(unit);
        command.arg("-o").arg(object(directory, unit));
        if running.len() >= std::thread::available_parallelism()?.get() {
            finish(running.remove(0))?;
        }
        running.push(command.stderr(Stdio::piped()).spawn()?);
    }
    running.into_iter().try_for_each(finish)?;
    let mut command = Command::new(compiler);
    command.args(LINK_FLAGS).args(units().map(|(unit, _)| object(directory, unit)));
    for map in sources.named("map") {
        command.arg(format!("-Wl,--version-script={}", map.display()));
    }
    command.arg("-o").arg(directory.join("libcuda.so.1"));
    finish(command.stderr(Stdio::piped()).spawn()?)?;
    std::os::unix::fs::symlink("libcuda.so.1", directory.join("libcuda.so"))
}

fn driver_units(sources: &Sources) -> impl Iterator<Item = (&Path, bool)> {
    sources.named("cpp").map(|unit| (unit, false))
}

fn object(directory: &Path, unit: &Path) -> PathBuf {
    directory.join(unit.file_stem().unwrap_or_default()).with_extension("o")
}

fn finish(compilation: Child) -> io::Result<()> {
    let output = compilation.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_with_launch_bounds_and_without() {
        let text = "extern \"C\" __global__ void a(int x) {}\n\
            extern \"C\" __global__ void __launch_bounds__(256)\nb_2(u8* y) {}\n\
            extern \"C\" __global__ void __launch_bounds__(1) c(const u8* z, u32 n) {}\n\
            __device__ inline void d(int x) {}";
        assert_eq!(kernel_names(text).collect::<Vec<_>>(), ["a", "b_2", "c"]);
    }

    #[test]
    fn all_kernels_are_in_the_unit() {
        let sources = Sources::read().unwrap();
        assert!(sources.kernels.contains("kernel_of<place>(\"place\")"), "{}", sources.kernels);
        assert_eq!(sources.kernels.matches("#include").count(), sources.named("cu").count() + 1);
    }
}
