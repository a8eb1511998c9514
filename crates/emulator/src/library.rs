//! Makes the libraries: once per build tree, whichever of several test processes comes first.

use std::{
    ffi::OsStr,
    fs::{self, File},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

const CRATE: &str = env!("CARGO_MANIFEST_DIR");

/// How all of it is compiled.
const FLAGS: [&str; 8] = [
    "-std=c++17",
    "-g1",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    // its longjmp refuses to change stacks
    "-U_FORTIFY_SOURCE",
    // memory is read as words of all sizes
    "-fno-strict-aliasing",
];

/// How the driver is, which nobody waits for but its compiler.
const DRIVER_FLAGS: [&str; 1] = ["-O1"];

const KERNEL_FLAGS: [&str; 5] = [
    "-O2",
    // one rounding per operation
    "-ffp-contract=off",
    // an access that is not aligned traps
    "-fsanitize=alignment",
    "-fsanitize-undefined-trap-on-error",
    // directives that only device compilers know
    "-Wno-unknown-pragmas",
];

const LINK_FLAGS: [&str; 3] = ["-shared", "-pthread", "-Wl,-Bsymbolic"];

/// The directory that holds `libcuda.so.1`, `libcuda.so` and `libnccl.so.2`, compiled unless `target_tmp` has it from
/// before; `None`, said on stderr past the capture of tests, where there is no C++ compiler (`$CXX`, or `g++`) or no
/// Linux.
///
/// `target_tmp` is a directory of the build tree: `env!("CARGO_TARGET_TMPDIR")` in tests. Of several calls in a process
/// the first one decides.
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
    // past the capture of passing tests' output; nobody to tell where that is closed
    let ignored = |why: &str| {
        let _ = writeln!(io::stderr(), "ignored: {why}, CUDA not emulated");
    };
    if !cfg!(target_os = "linux") {
        ignored("not Linux");
        return None;
    }
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    let Ok(version) = Command::new(&compiler).arg("--version").output() else {
        ignored(&format!("no {compiler}"));
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

/// What the libraries are made of.
struct Sources {
    /// Of [`DRIVER`], [`NCCL`] and [`KERNELS`], in the order of their names.
    files: Vec<(PathBuf, Vec<u8>)>,
}

const DRIVER: &str = "cpp";
const NCCL: &str = "nccl";
const KERNELS: &str = "../kernels/cu";

impl Sources {
    fn read() -> io::Result<Sources> {
        let mut files = Vec::new();
        for folder in [DRIVER, NCCL, KERNELS] {
            let mut paths = fs::read_dir(Path::new(CRATE).join(folder))?
                .map(|file| Ok(file?.path()))
                .collect::<io::Result<Vec<_>>>()?;
            paths.sort();
            for path in paths {
                let text = fs::read(&path)?;
                files.push((path, text));
            }
        }
        Ok(Sources { files })
    }

    fn key(&self, compiler_version: &[u8]) -> u64 {
        let mut hasher = DefaultHasher::new();
        (FLAGS, DRIVER_FLAGS, KERNEL_FLAGS, LINK_FLAGS, compiler_version).hash(&mut hasher);
        (&self.files, self.kernel_unit(), self.driver_unit(), self.nccl_unit()).hash(&mut hasher);
        hasher.finish()
    }

    /// Those of a folder.
    fn of(&self, folder: &str, extension: &str) -> impl Iterator<Item = (&Path, &[u8])> {
        let folder = Path::new(CRATE).join(folder);
        let files = self.files.iter().map(|(path, text)| (path.as_path(), text.as_slice()));
        files.filter(move |(path, _)| {
            path.parent() == Some(&folder) && path.extension() == Some(OsStr::new(extension))
        })
    }

    /// All `.cu` files, and the table of their kernels.
    fn kernel_unit(&self) -> String {
        let (mut unit, mut table) = ("#include \"device.hpp\"\n".to_owned(), String::new());
        for (path, text) in self.of(KERNELS, "cu") {
            unit += &include(path);
            for name in kernel_names(&String::from_utf8_lossy(text)) {
                table += &format!("    kernel_of<{name}>(\"{name}\"),\n");
            }
        }
        unit + "const emulator::Kernel emulator::KERNELS[] = {\n"
            + &table
            + "};\nconst size_t emulator::KERNEL_COUNT = sizeof KERNELS / sizeof *KERNELS;\n"
    }

    /// All of the driver: its headers take longer to compile than it does.
    fn driver_unit(&self) -> String {
        self.of(DRIVER, "cpp").map(|(path, _)| include(path)).collect()
    }

    /// All of NCCL, with what the driver reads its settings by.
    fn nccl_unit(&self) -> String {
        let settings = include(&Path::new(CRATE).join(DRIVER).join("settings.cpp"));
        settings + &self.of(NCCL, "cpp").map(|(path, _)| include(path)).collect::<String>()
    }
}

fn include(path: &Path) -> String {
    format!("#include \"{}\"\n", path.display())
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
    let units = [
        ("kernels", sources.kernel_unit(), &KERNEL_FLAGS[..]),
        ("driver", sources.driver_unit(), &DRIVER_FLAGS[..]),
        ("nccl", sources.nccl_unit(), &DRIVER_FLAGS[..]),
    ];
    let mut running = Vec::new();
    for (name, text, flags) in &units {
        let unit = directory.join(name).with_extension("cpp");
        fs::write(&unit, text)?;
        let mut command = Command::new(compiler);
        command.args(FLAGS).args(*flags).arg("-I").arg(Path::new(CRATE).join(DRIVER));
        command.arg("-c").arg(&unit).arg("-o").arg(unit.with_extension("o"));
        running.push(command.stderr(Stdio::piped()).spawn()?);
    }
    running.into_iter().try_for_each(finish)?;
    let libraries = [
        ("libcuda.so.1", &["kernels", "driver"][..], sources.of(DRIVER, "map")),
        ("libnccl.so.2", &["nccl"][..], sources.of(NCCL, "map")),
    ];
    for (library, units, map) in libraries {
        let mut command = Command::new(compiler);
        command.args(LINK_FLAGS).arg(format!("-Wl,-soname,{library}"));
        command.args(units.iter().map(|unit| directory.join(unit).with_extension("o")));
        command.args(map.map(|(map, _)| format!("-Wl,--version-script={}", map.display())));
        command.arg("-o").arg(directory.join(library));
        finish(command.stderr(Stdio::piped()).spawn()?)?;
    }
    std::os::unix::fs::symlink("libcuda.so.1", directory.join("libcuda.so"))
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
        let unit = sources.kernel_unit();
        assert!(unit.contains("kernel_of<place>(\"place\")"), "{unit}");
        assert_eq!(unit.matches("#include").count(), sources.of(KERNELS, "cu").count() + 1);
    }
}
