// What this build was made of, in a module that links to no part of torch: it loads, and can say
// what is wrong, where the ops would not.
#include <pybind11/pybind11.h>

namespace py = pybind11;

#define FASTRNN_STRING(x) FASTRNN_STRING_OF(x)
#define FASTRNN_STRING_OF(x) #x

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What this build of fastrnn was made of.";
  m.attr("version") = FASTRNN_STRING(FASTRNN_VERSION);
#if defined(FASTRNN_COMMIT)
  m.attr("commit") = FASTRNN_STRING(FASTRNN_COMMIT);
#else
  m.attr("commit") = py::none();
#endif
  m.attr("torch_version") = FASTRNN_STRING(FASTRNN_TORCH_VERSION);
#if defined(FASTRNN_CUDA_VERSION)
  m.attr("cuda") = FASTRNN_STRING(FASTRNN_CUDA_VERSION);
#else
  m.attr("cuda") = py::none();
#endif
  m.attr("compiler") = "g++ " __VERSION__;  // setup.py stops where it is another
}
