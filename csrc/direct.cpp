// The ops recurrent and cell as Python functions for plain calls, past torch.ops, whose reading of
// arguments takes longer than a small call computes; and the masks of dropout likewise. Where a
// call is not plain they return NotImplemented, and the caller goes through torch.ops. A library of
// its own: the ops need no Python.
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <string>
#include <string_view>

#include "signatures.h"
#include "vmap.h"

namespace fastrnn {
namespace {

using at::Tensor;

// Whether nothing is active that is to see calls of torch.ops or that the ops' own kernels do not
// know: no mode or tracer on this thread, nor forward-mode AD. (Autocast they know.)
bool is_plain_context() {
  constexpr c10::DispatchKeySet usual({c10::DispatchKey::BackendSelect,
                                       c10::DispatchKey::ADInplaceOrView,
                                       c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                       c10::DispatchKey::FuncTorchDynamicLayerBackMode});
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included - usual).empty() && !at::impl::torch_function_mode_enabled() && !in_forward_ad();
}

// Whether a transform of torch.func is active.
bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether none is, or vmap alone, of inputs or states.
bool knows_transforms(const Inputs& inputs) {
  if (!is_transformed()) return true;
  const auto& [x, batch_sizes, h0, c0, weights, masks] = inputs;
  const auto is_plain = [](const Tensor& tensor) { return !is_differentiated(tensor); };
  const int64_t level = std::max({level_of(x), level_of(h0), level_of(c0), level_of(masks)});
  return level_of(batch_sizes) == 0 && level > level_of(weights) && is_plain(x) &&
         (!h0.has_value() || is_plain(*h0)) && (!c0.has_value() || is_plain(*c0)) &&
         std::all_of(weights.begin(), weights.end(), is_plain) &&
         (!masks.has_value() || is_plain(*masks));
}

// Whether the ops are to compute on x: what fastrnn._fused.can_fuse says of plain calls, but that a
// GPU too old is left to the op, which refuses it.
bool covers(const Tensor& x) {
  static const bool has_cuda = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("fastrnn::recurrent", "")
                                   .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return (x.is_cpu() || (has_cuda && x.is_cuda())) && x.layout() == at::kStrided &&
         !x.is_nested() && is_fused(x.scalar_type());
}

// Reads Python objects one after the other, as long as they are of the very types that the ops
// declare: what a subclass of Tensor means only torch.ops knows. A null is of none.
class Reader {
 public:
  Reader(PyObject* const* arguments, Py_ssize_t count) : next_(arguments), left_(count) {}

  // Whether all arguments were read, and none was left over.
  bool ok() const { return ok_ && left_ == 0; }

  std::string_view string() {
    PyObject* const object = take();
    Py_ssize_t size = 0;
    const char* const data = accept(object && PyUnicode_CheckExact(object))
                                 ? PyUnicode_AsUTF8AndSize(object, &size)
                                 : nullptr;
    if (!data) {
      PyErr_Clear();
      ok_ = false;
      return {};
    }
    return {data, static_cast<size_t>(size)};
  }
  Tensor tensor() { return as_tensor(take()); }
  OptionalTensor optional_tensor() {
    PyObject* const object = take();
    return object == Py_None ? std::nullopt : OptionalTensor(as_tensor(object));
  }
  // None, or a tuple or list of two.
  std::pair<OptionalTensor, OptionalTensor> pair() {
    PyObject* const object = take();
    if (object == Py_None) return {};
    const bool is_sequence = object && (PyTuple_CheckExact(object) || PyList_CheckExact(object));
    if (!accept(is_sequence && PySequence_Fast_GET_SIZE(object) == 2)) return {};
    PyObject* const* const items = PySequence_Fast_ITEMS(object);
    return {as_tensor(items[0]), as_tensor(items[1])};
  }
  // Two arguments: a module's parameters by name, and the names of those that are wanted.
  std::vector<Tensor> parameters() {
    PyObject *const by_name = take(), *const names = take();
    std::vector<Tensor> result;
    if (!accept(by_name && PyDict_CheckExact(by_name) && names && PyList_CheckExact(names))) {
      return result;
    }
    const Py_ssize_t count = PyList_GET_SIZE(names);
    result.reserve(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      result.push_back(as_tensor(PyDict_GetItem(by_name, PyList_GET_ITEM(names, i))));
    }
    return result;
  }
  double real() {
    PyObject* const object = take();
    return accept(object && PyFloat_CheckExact(object)) ? PyFloat_AS_DOUBLE(object) : 0;
  }
  int64_t integer() {
    PyObject* const object = take();
    if (!accept(object && PyLong_CheckExact(object))) return 0;
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
    accept(overflow == 0);
    return value;
  }
  bool boolean() {
    PyObject* const object = take();
    accept(object == Py_True || object == Py_False);
    return object == Py_True;
  }

 private:
  PyObject* take() {
    if (!accept(left_ > 0)) return nullptr;
    --left_;
    return *next_++;
  }
  Tensor as_tensor(PyObject* object) {
    return accept(object && THPVariable_CheckExact(object)) ? THPVariable_Unpack(object) : Tensor();
  }
  bool accept(bool good) {
    ok_ = ok_ && good;
    return good;
  }

  PyObject* const* next_;
  Py_ssize_t left_;
  bool ok_ = true;
};

// What the ops take of a module, which is given by its __dict__.
class Module {
 public:
  explicit Module(PyObject* attributes) {
    static const auto names =
        [](auto... name) { return std::array{PyUnicode_InternFromString(name)...}; }(
            "mode", "_parameters", "_flat_weights_names", "num_layers", "bias", "bidirectional",
            "batch_first", "training", "dropout");
    std::array<PyObject*, std::tuple_size_v<decltype(names)>> values{};
    if (PyDict_CheckExact(attributes)) {
      std::transform(names.begin(), names.end(), values.begin(),
                     [&](PyObject* name) { return PyDict_GetItem(attributes, name); });
    }
    Reader read(values.data(), values.size());
    mode_ = read.string();
    weights_ = read.parameters();
    num_layers_ = read.integer();
    has_biases_ = read.boolean();
    bidirectional_ = read.boolean();
    batch_first_ = read.boolean();
    const bool training = read.boolean();
    drops_ = read.real() != 0 && training && num_layers_ > 1;
    ok_ = read.ok();
  }

  bool ok() const { return ok_; }
  bool is_lstm() const { return mode_ == "LSTM"; }
  bool drops() const { return drops_; }
  const std::vector<Tensor>& weights() const { return weights_; }
  Options options(double dropout) const {
    return {mode_, num_layers_, has_biases_, bidirectional_, batch_first_, dropout};
  }

 private:
  std::string mode_;  // a copy: other Python threads run meanwhile
  std::vector<Tensor> weights_;
  int64_t num_layers_;
  bool has_biases_, bidirectional_, batch_first_, drops_, ok_;
};

// The op's results, or nothing where the call is not plain.
std::optional<std::tuple<Tensor, Tensor, Tensor>> run(const Module& module, const Inputs& inputs,
                                                      double dropout) {
  if (!module.ok() || !covers(inputs.x) || !knows_transforms(inputs)) return std::nullopt;
  const pybind11::gil_scoped_release no_gil;
  return call_recurrent(module.options(dropout), inputs);
}

// A tuple of those, which are taken over, or null with an exception set.
template <typename... Objects>
PyObject* tuple_of(Objects... objects) {
  PyObject* const result = (objects && ...) ? PyTuple_New(sizeof...(objects)) : nullptr;
  if (!result) {
    (Py_XDECREF(objects), ...);
    return nullptr;
  }
  Py_ssize_t i = 0;
  (PyTuple_SET_ITEM(result, i++, objects), ...);
  return result;
}

template <typename... Tensors>
PyObject* wrap(Tensors&&... tensors) {
  return tuple_of(THPVariable_Wrap(std::move(tensors))...);
}

// A module's forward: its __dict__, the input and hx.
PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count == 3 && is_plain_context()) {
    const Module module(arguments[0]);
    Reader read(arguments + 1, 2);
    const Tensor x = read.tensor();
    const auto [h0, c0] = module.is_lstm() ? read.pair() : std::pair(read.optional_tensor(), kNone);
    if (read.ok() && !module.drops()) {
      if (auto outputs = run(module, {x, kNone, h0, c0, module.weights()}, 0)) {
        auto& [y, h_n, c_n] = *outputs;
        if (!module.is_lstm()) return wrap(std::move(y), std::move(h_n));
        PyObject* const states = wrap(std::move(h_n), std::move(c_n));
        return tuple_of(THPVariable_Wrap(std::move(y)), states);
      }
    }
  }
  Py_RETURN_NOTIMPLEMENTED;
  END_HANDLE_TH_ERRORS
}

// The op on a module, given by its __dict__.
PyObject* recurrent(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count > 0 && is_plain_context()) {
    const Module module(arguments[0]);
    Reader read(arguments + 1, count - 1);
    const Tensor x = read.tensor();
    const OptionalTensor batch_sizes = read.optional_tensor();
    const OptionalTensor h0 = read.optional_tensor(), c0 = read.optional_tensor();
    const OptionalTensor masks = read.optional_tensor();
    const double dropout = read.real();
    if (read.ok()) {
      if (auto outputs = run(module, {x, batch_sizes, h0, c0, module.weights(), masks}, dropout)) {
        auto& [y, h_n, c_n] = *outputs;
        return wrap(std::move(y), std::move(h_n), std::move(c_n));
      }
    }
  }
  Py_RETURN_NOTIMPLEMENTED;
  END_HANDLE_TH_ERRORS
}

PyObject* cell(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (is_plain_context()) {
    Reader read(arguments, count);
    const std::string_view mode = read.string();
    const Tensor x = read.tensor();
    const OptionalTensor h0 = read.optional_tensor(), c0 = read.optional_tensor();
    const std::vector<Tensor> weights = read.parameters();
    const bool has_biases = read.boolean();
    const Inputs inputs{x, {}, h0, c0, weights};
    if (read.ok() && covers(x) && knows_transforms(inputs)) {
      auto [h, c] = [&] {
        const pybind11::gil_scoped_release no_gil;
        return call_cell(mode, inputs, has_biases);
      }();
      return wrap(std::move(h), std::move(c));
    }
  }
  Py_RETURN_NOTIMPLEMENTED;
  END_HANDLE_TH_ERRORS
}

// The masks of `count` layers, of x's steps by width, where nothing is to see that they are drawn:
// one after the other, as torch.nn does, so that under the same seed they are its.
PyObject* draw_masks(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  HANDLE_TH_ERRORS
  if (is_plain_context() && !is_transformed()) {
    Reader read(arguments, given);
    const Tensor x = read.tensor();
    const bool batch_first = read.boolean();
    const int64_t count = read.integer(), width = read.integer();
    const double dropout = read.real();
    if (read.ok() && covers(x) && x.dim() > (batch_first ? 2 : 0)) {
      std::vector<int64_t> sizes = x.sizes().vec();
      sizes.back() = width;
      if (batch_first) std::swap(sizes[0], sizes[1]);
      sizes.insert(sizes.begin(), count);
      Tensor masks = [&] {
        const pybind11::gil_scoped_release no_gil;
        at::AutoDispatchBelowADInplaceOrView guard;
        Tensor drawn = at::empty(sizes, x.options().dtype(at::kBool));
        if (dropout == 1) return drawn.zero_();
        for (int64_t layer = 0; layer < count; ++layer) drawn[layer].bernoulli_(1 - dropout);
        return drawn;
      }();
      return THPVariable_Wrap(std::move(masks));
    }
  }
  Py_RETURN_NOTIMPLEMENTED;
  END_HANDLE_TH_ERRORS
}

template <typename Function>
PyMethodDef method(const char* name, Function function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, doc};
}

}  // namespace
}  // namespace fastrnn

PyMODINIT_FUNC PyInit__direct() {
  using namespace fastrnn;
  static PyMethodDef methods[] = {
      method("forward", forward, "A module's forward, or NotImplemented."),
      method("recurrent", recurrent, "torch.ops.fastrnn.recurrent, or NotImplemented."),
      method("cell", cell, "torch.ops.fastrnn.cell, or NotImplemented."),
      method("draw_masks", draw_masks, "Masks of dropout, or NotImplemented."),
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
