// One launcher for every Triton kernel, built once.
//
// Triton 3.6 writes a C file for each signature of a kernel and compiles it when the kernel is first launched, which needs a C compiler and
// its headers beside the model server. The files differ in nothing but the types of the kernel's parameters, so here these are an argument:
// a letter for each,
//
//   x  a constant: not passed                 p  an address: an object with data_ptr(), a number, or None
//   i  an integer of any width                t  a tensor map (128 bytes, by value)
//   e  fp16    y  bf16    f  fp32    d  fp64
//
// Every value is put into eight bytes, little-endian: the driver reads as many of them as the kernel's parameter has.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "cuda.h"

#define MOST_PARAMETERS 126
#define FIXED 14  // the letters, and what Triton passes before a kernel's own arguments

// As in Triton's cuda_utils, which makes these objects.
typedef struct {
  PyObject_HEAD;
  _Alignas(128) CUtensorMap tensorMap;
} TensorMapObject;

static PyObject *data_ptr_name;

static bool succeeded(CUresult code) {
  if (code == CUDA_SUCCESS) return true;
  const char *text = NULL;
  cuGetErrorString(code, &text);
  if (!PyErr_Occurred()) PyErr_Format(PyExc_RuntimeError, "Triton Error [CUDA]: %s", text ? text : "unknown");
  return false;
}

static bool ensure_context(void) {
  CUcontext context;
  if (!succeeded(cuCtxGetCurrent(&context))) return false;
  if (context) return true;
  CUdevice device;
  return succeeded(cuDeviceGet(&device, 0)) && succeeded(cuDevicePrimaryCtxRetain(&context, device)) && succeeded(cuCtxSetCurrent(context));
}

static bool read_address(PyObject *argument, Py_ssize_t index, uint64_t *value) {
  *value = 0;
  if (argument == Py_None) return true;
  if (PyLong_Check(argument)) {
    *value = PyLong_AsUnsignedLongLong(argument);
    return !PyErr_Occurred();
  }
  PyObject *number = PyObject_CallMethodNoArgs(argument, data_ptr_name);
  if (!number) return false;
  *value = PyLong_AsUnsignedLongLong(number);
  Py_DECREF(number);
  if (PyErr_Occurred()) return false;
  if (!*value) return true;
  CUdeviceptr on_device;
  CUresult code = cuPointerGetAttribute(&on_device, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, *value);
  if (code == CUDA_ERROR_INVALID_VALUE) {
    PyErr_Format(PyExc_ValueError, "Pointer argument (at %zd) cannot be accessed from Triton (cpu tensor?)", index);
    return false;
  }
  if (!succeeded(code)) return false;
  *value = on_device;
  return true;
}

static bool read_float(PyObject *argument, char letter, uint64_t *value) {
  double number = PyFloat_AsDouble(argument);
  if (number == -1.0 && PyErr_Occurred()) return false;
  *value = 0;
  float narrow = (float)number;
  uint32_t bits;
  memcpy(&bits, &narrow, sizeof bits);
  switch (letter) {
    case 'd': memcpy(value, &number, sizeof number); return true;
    case 'f': *value = bits; return true;
    case 'y': *value = bits >> 16; return true;
    default: return PyFloat_Pack2(number, (char *)value, 1) == 0;
  }
}

// The place of a parameter's value: `slot`, unless it is a tensor map, which is read where it lies. NULL with an exception set.
static void *read_parameter(PyObject *argument, char letter, Py_ssize_t index, uint64_t *slot) {
  switch (letter) {
    case 'p': return read_address(argument, index, slot) ? slot : NULL;
    case 'i':
      *slot = PyLong_AsUnsignedLongLongMask(argument);
      return PyErr_Occurred() ? NULL : slot;
    case 't': {
      if (strcmp(Py_TYPE(argument)->tp_name, "triton.backends.nvidia.PyCUtensorMap")) {
        PyErr_Format(PyExc_TypeError, "object must be of type PyCUtensorMap, got %s", Py_TYPE(argument)->tp_name);
        return NULL;
      }
      return &((TensorMapObject *)argument)->tensorMap;
    }
    default: return read_float(argument, letter, slot) ? slot : NULL;
  }
}

static void set_attributes(CUlaunchConfig *config, CUlaunchAttribute *attributes, int num_ctas, bool cooperative, bool overlapped) {
  unsigned count = 0;
  if (overlapped) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attributes[count++].value.programmaticStreamSerializationAllowed = 1;
  }
  if (cooperative) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    attributes[count++].value.cooperative = 1;
  }
  if (num_ctas != 1) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attributes[count].value.clusterDim.x = num_ctas;
    attributes[count].value.clusterDim.y = 1;
    attributes[count++].value.clusterDim.z = 1;
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE;
    attributes[count++].value.clusterSchedulingPolicyPreference = CU_CLUSTER_SCHEDULING_POLICY_SPREAD;
  }
  config->attrs = attributes;
  config->numAttrs = count;
}

static bool call_hook(PyObject *hook, PyObject *metadata) {
  if (hook == Py_None) return true;
  PyObject *answer = PyObject_CallOneArg(hook, metadata);
  Py_XDECREF(answer);
  return answer != NULL;
}

// launch(letters, grid x, y, z, stream, function, cooperative, overlapped, global scratch, profile scratch,
//        (warps, CTAs, shared bytes), metadata, enter hook, exit hook, *arguments)
static PyObject *launch(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  char *letters;
  Py_ssize_t num_letters;
  if (count < FIXED || PyBytes_AsStringAndSize(args[0], &letters, &num_letters) < 0) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "too few arguments for a launch");
    return NULL;
  }
  if (num_letters != count - FIXED || num_letters > MOST_PARAMETERS) {
    PyErr_Format(PyExc_TypeError, "a kernel of %zd parameters was launched with %zd", num_letters, count - FIXED);
    return NULL;
  }
  long grid[3];
  for (int i = 0; i < 3; i++) grid[i] = PyLong_AsLong(args[1 + i]);
  CUstream stream = (CUstream)PyLong_AsUnsignedLongLong(args[4]);
  CUfunction function = (CUfunction)PyLong_AsUnsignedLongLong(args[5]);
  int cooperative = PyObject_IsTrue(args[6]), overlapped = PyObject_IsTrue(args[7]);
  int num_warps, num_ctas, shared_bytes;
  if (PyErr_Occurred() || !PyArg_ParseTuple(args[10], "iii", &num_warps, &num_ctas, &shared_bytes)) return NULL;
  if (!ensure_context() || !call_hook(args[12], args[11])) return NULL;

  uint64_t values[MOST_PARAMETERS + 2];
  void *parameters[MOST_PARAMETERS + 2];
  int used = 0;
  for (Py_ssize_t i = 0; i < num_letters; i++) {
    if (letters[i] == 'x') continue;
    if (!(parameters[used] = read_parameter(args[FIXED + i], letters[i], i, &values[used]))) return NULL;
    used++;
  }
  for (int i = 0; i < 2; i++, used++)  // every Triton kernel takes these two last
    if (!(parameters[used] = read_parameter(args[8 + i], 'p', -1, &values[used]))) return NULL;

  if (grid[0] > 0 && grid[1] > 0 && grid[2] > 0) {
    CUlaunchAttribute attributes[4] = {0};
    CUlaunchConfig config = {
        .gridDimX = grid[0] * num_ctas, .gridDimY = grid[1], .gridDimZ = grid[2],
        .blockDimX = 32 * num_warps, .blockDimY = 1, .blockDimZ = 1, .sharedMemBytes = shared_bytes, .hStream = stream,
    };
    set_attributes(&config, attributes, num_ctas, cooperative, overlapped);
    CUresult code = CUDA_SUCCESS;
    Py_BEGIN_ALLOW_THREADS;
    if (num_ctas == 16) code = cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1);
    if (code == CUDA_SUCCESS) code = cuLaunchKernelEx(&config, function, parameters, NULL);
    Py_END_ALLOW_THREADS;
    if (!succeeded(code)) return NULL;
  }
  if (!call_hook(args[13], args[11])) return NULL;
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"launch", (PyCFunction)(void (*)(void))launch, METH_FASTCALL, "Launch a kernel whose parameters' types are given as letters."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "launcher", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_launcher(void) {
  data_ptr_name = PyUnicode_InternFromString("data_ptr");
  return data_ptr_name ? PyModule_Create(&definition) : NULL;
}
