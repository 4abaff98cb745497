"""Code that is only there to be linked into other code: neither optimised by itself nor assembled.

Numba optimises and assembles each function that it compiles, and links the result into those that call it,
where it is optimised again: six times, from a transform of columns up to a convolution. And of each
``prange`` loop it makes three functions, each linked into the next one and all into the function that the
loop stands in::

    loop's body > wrapper that finds its arguments > wrapper that shares the iterations out > function

Nobody but the last calls any of them. As parts, they are optimised and assembled with it, once: the kernels
of a training take seven tenths of the time to compile.

These are Numba's private classes. Where another version makes loops by other functions, `link_loops`
changes nothing.
"""

from typing import Any

from numba.core import codegen
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, Flags
from numba.parfors import parfor_lowering


class PartLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code of a part."""

    def finalize(self) -> None:
        """Put in what it calls, and leave it at that."""
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalize_dynamic_globals()
        self._finalized = True


class PartCompiler(Compiler):  # type: ignore[misc]
    """Compiles a function that is only a part of others."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.state.flags.no_compile = True
        self.state.library = PartLibrary(self.state.targetctx.codegen(), "part")

    def compile_extra(self, function: Any) -> Any:
        """Compile the function for what it will be linked into."""
        part = super().compile_extra(function)
        # What Python would call. Nobody will, but Numba knows it by that; each list has a method of its own.
        entry: Any = [].clear
        self.state.targetctx.insert_user_function(entry, part.fndesc, [part.library])
        return part._replace(entry_point=entry)


class _Loops:
    """The loop that Numba is at: what it makes for it is a part."""

    def __init__(self) -> None:
        self._make_body = parfor_lowering._create_gufunc_for_parfor_body
        self._call_body = parfor_lowering.call_parallel_gufunc
        self._create_library = codegen.JITCPUCodegen.create_library
        self._body_flags: Flags | None = None
        self._wraps = False

    def make_body(self, *arguments: Any) -> Any:
        """Compile a loop's body, for which a library will be asked."""
        self._body_flags = next(each for each in arguments if isinstance(each, Flags))
        try:
            return self._make_body(*arguments)
        finally:
            self._body_flags = None

    def call_body(self, *arguments: Any) -> Any:
        """Make the wrappers, and the code that calls them."""
        self._wraps = True
        try:
            return self._call_body(*arguments)
        finally:
            self._wraps = False

    def create_library(self, owner: Any, name: str, **options: Any) -> Any:
        """Create a library: `PartLibrary` for what belongs to the loop."""
        flags = self._body_flags
        if flags is not None and name.startswith("__numba_parfor_gufunc"):
            # Only now: by their flags, functions that the body calls are found when types are inferred.
            flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        elif not (self._wraps and "gufunc" in name.lower()):
            return self._create_library(owner, name, **options)
        return PartLibrary(owner, name, **options)


def link_loops() -> None:
    """Have Numba make what belongs to a ``prange`` loop as parts of the function that it stands in."""
    try:
        loops = _Loops()
    except AttributeError:
        return
    parfor_lowering._create_gufunc_for_parfor_body = loops.make_body
    parfor_lowering.call_parallel_gufunc = loops.call_body
    codegen.JITCPUCodegen.create_library = lambda owner, name, **options: loops.create_library(
        owner, name, **options
    )
