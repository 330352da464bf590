//! Compiles every variant that `../variants.txt` lists to `../../spirv/NAME.spv`, and writes the manifest: the
//! sums of the sources and of what was made of them. With `--check` it writes nothing and fails where a file would change.

use glslang::{
    Compiler, CompilerOptions, ShaderInput, ShaderMessage, ShaderSource, ShaderStage, SourceLanguage,
    SpirvVersion, Target, VulkanVersion,
    include::{IncludeHandler, IncludeResult, IncludeType},
};
use sha2::{Digest, Sha256};
use std::{
    env, error::Error, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

type Failure = Box<dyn Error>;

fn main() -> ExitCode {
    let check = match env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [only] if only == "--check" => true,
        _ => {
            eprintln!("usage: shader-compiler [--check]");
            return ExitCode::from(2);
        }
    };
    match run(check) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(check: bool) -> Result<(), Failure> {
    let shaders = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("no folder of shaders")?.to_owned();
    let spirv = shaders.with_file_name("spirv");
    let list = fs::read_to_string(shaders.join("variants.txt"))?;
    let mut written = Vec::new();
    for line in list.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        let (Some(name), Some(file)) = (words.next(), words.next()) else {
            return Err(format!("variants.txt: expected NAME FILE [DEFINE=VALUE]…, found `{line}`").into());
        };
        let code = compile(&shaders, file, &words.collect::<Vec<_>>()).map_err(|e| format!("{name}: {e}"))?;
        written.push((format!("{name}.spv"), code));
    }
    let manifest = manifest(&shaders, &written)?;
    written.push(("manifest.txt".to_owned(), manifest.into_bytes()));
    for (name, bytes) in &written {
        let path = spirv.join(name);
        let old = fs::read(&path).unwrap_or_default();
        if check && old != *bytes {
            return Err(format!("{name} is not what its sources compile to; run shader-compiler").into());
        }
        if old != *bytes {
            fs::write(&path, bytes)?;
            println!("{name}: {} bytes", bytes.len());
        }
    }
    for entry in fs::read_dir(&spirv)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !written.iter().any(|(other, _)| *other == name) {
            if check {
                return Err(format!("{name} has no variant").into());
            }
            fs::remove_file(spirv.join(&name))?;
            println!("{name}: removed");
        }
    }
    Ok(())
}

/// SHA-256 of every source and of what was made of them, as `sha256sum` writes it: in `backend-vulkan`,
/// `sha256sum --check spirv/manifest.txt` says what was changed, and so does a test there.
fn manifest(shaders: &Path, written: &[(String, Vec<u8>)]) -> Result<String, Failure> {
    let mut sources: Vec<PathBuf> = Vec::new();
    let compiler = shaders.join("compiler");
    // The compiler is a source of what it makes, too.
    sources.extend([compiler.join("Cargo.lock"), compiler.join("src/main.rs")]);
    for folder in [shaders.to_owned(), shaders.join("include")] {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_file() {
                sources.push(path);
            }
        }
    }
    sources.sort();
    let mut lines = String::new();
    for source in &sources {
        let name = source.strip_prefix(shaders)?.display();
        lines += &format!("{:x}  shaders/{name}\n", Sha256::digest(fs::read(source)?));
    }
    for (name, bytes) in written {
        lines += &format!("{:x}  spirv/{name}\n", Sha256::digest(bytes));
    }
    Ok(lines)
}

fn compile(shaders: &Path, file: &str, defines: &[&str]) -> Result<Vec<u8>, Failure> {
    let compiler = Compiler::acquire().ok_or("glslang does not start")?;
    let source = ShaderSource::from(fs::read_to_string(shaders.join(file))?);
    let options = CompilerOptions {
        source_language: SourceLanguage::GLSL,
        target: Target::Vulkan { version: VulkanVersion::Vulkan1_2, spirv_version: SpirvVersion::SPIRV1_5 },
        version_profile: None,
        messages: ShaderMessage::DEFAULT,
    };
    let defines: Vec<(&str, Option<&str>)> = defines
        .iter()
        .map(|define| define.split_once('=').map_or((*define, None), |(name, value)| (name, Some(value))))
        .collect();
    let defines: Vec<_> = defines.iter().map(|(name, value)| (*name, *value).into()).collect();
    let mut include = Include { folder: shaders.join("include") };
    let input = ShaderInput::new(&source, ShaderStage::Compute, &options, Some(&defines), Some(&mut include))?;
    let words = compiler.create_shader(input)?.compile()?;
    Ok(words.iter().flat_map(|word| word.to_le_bytes()).collect())
}

struct Include {
    folder: PathBuf,
}

impl IncludeHandler for Include {
    fn include(&mut self, _: IncludeType, name: &str, _: &str, _: usize) -> Option<IncludeResult> {
        let data = fs::read_to_string(self.folder.join(name)).ok()?;
        Some(IncludeResult { name: name.to_owned(), data })
    }
}
