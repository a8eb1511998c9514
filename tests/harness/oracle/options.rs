//! The options of a load, and the kernel layout that follows from them.

use super::checkpoint::Stored;

/// What `longshore load` is told; the defaults are one rank and no switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `--tp`
    pub tp: usize,
    /// `--ep`
    pub ep: usize,
    /// `--kernel-layout`, or nothing where the option is not given.
    pub kernel_layout: Option<String>,
    /// `--fuse-shared-experts`
    pub fuse_shared_experts: bool,
    /// `--draft`
    pub draft: bool,
    /// `--language-only`
    pub language_only: bool,
    /// `--encoder-only`
    pub encoder_only: bool,
}

impl Options {
    /// No option but `--tp`.
    pub fn tp(tp: usize) -> Options {
        Options {
            tp,
            ep: 1,
            kernel_layout: None,
            fuse_shared_experts: false,
            draft: false,
            language_only: false,
            encoder_only: false,
        }
    }

    /// Sets `--ep`.
    pub fn ep(self, ep: usize) -> Options {
        Options { ep, ..self }
    }

    /// Sets `--kernel-layout`.
    pub fn kernel_layout(self, layout: &str) -> Options {
        Options { kernel_layout: Some(layout.to_owned()), ..self }
    }

    /// Sets `--fuse-shared-experts`.
    pub fn fuse_shared_experts(self) -> Options {
        Options { fuse_shared_experts: true, ..self }
    }

    /// Sets `--draft`.
    pub fn draft(self) -> Options {
        Options { draft: true, ..self }
    }

    /// Sets `--language-only`.
    pub fn language_only(self) -> Options {
        Options { language_only: true, ..self }
    }

    /// Sets `--encoder-only`.
    pub fn encoder_only(self) -> Options {
        Options { encoder_only: true, ..self }
    }

    /// The same options as command-line arguments of `longshore load` and `longshore plan`.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["--tp".to_owned(), self.tp.to_string()];
        if self.ep != 1 {
            arguments.extend(["--ep".to_owned(), self.ep.to_string()]);
        }
        if let Some(layout) = &self.kernel_layout {
            arguments.extend(["--kernel-layout".to_owned(), layout.clone()]);
        }
        let switches = [
            (self.fuse_shared_experts, "--fuse-shared-experts"),
            (self.draft, "--draft"),
            (self.language_only, "--language-only"),
            (self.encoder_only, "--encoder-only"),
        ];
        for (on, switch) in switches {
            if on {
                arguments.push(switch.to_owned());
            }
        }
        arguments
    }

    /// The layout that the parameters end in: the asked one, or what the quantisation needs.
    pub(super) fn effective_layout(&self, declared: Stored) -> Layout {
        match (self.kernel_layout.as_deref(), declared) {
            (Some("none"), _) => Layout::None,
            (Some("cutlass"), _) | (None, Stored::Nvfp4) => Layout::Cutlass,
            (Some("flashinfer-cutlass"), _) => Layout::FlashinferCutlass,
            (Some("trtllm"), _) => Layout::Trtllm,
            (Some("aiter"), _) | (None, Stored::Mxfp4) => Layout::Aiter,
            (None, _) => Layout::None,
            (Some(other), _) => panic!("no kernel layout is called {other}"),
        }
    }

    /// Whether everything after sharding is left out: only by an explicit `none`.
    pub(super) fn is_raw(&self) -> bool {
        self.kernel_layout.as_deref() == Some("none")
    }
}

/// Which post-processing the parameters end in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    None,
    Cutlass,
    FlashinferCutlass,
    Trtllm,
    Aiter,
}

impl Layout {
    /// The name in manifests.
    pub(super) fn name(self) -> &'static str {
        match self {
            Layout::None => "none",
            Layout::Cutlass => "cutlass",
            Layout::FlashinferCutlass => "flashinfer-cutlass",
            Layout::Trtllm => "trtllm",
            Layout::Aiter => "aiter",
        }
    }
}
