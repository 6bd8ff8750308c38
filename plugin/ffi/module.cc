// The Python module jax_gluon._plugin: handler capsules and device information, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"
#include "ffi/handlers.h"
#include "ffi/kernel_query.h"
#include "metal/choice.h"
#include "metal/metal.h"
#include "metal/self_test.h"
#include "xla/ffi/api/c_api.h"

namespace py = pybind11;

PYBIND11_MODULE(_plugin, module) {
  module.def(
      "registrations",
      [] {
        const auto capsule = [](XLA_FFI_Handler* handler) {
          return py::capsule(reinterpret_cast<void*>(handler));
        };
        py::dict handlers;
        handlers["jax_gluon.attention_forward"] = capsule(JaxGluonAttentionForward);
        handlers["jax_gluon.attention_backward"] = capsule(JaxGluonAttentionBackward);
        handlers["jax_gluon.attention_backward_bias"] = capsule(JaxGluonAttentionBackwardBias);
        handlers["jax_gluon.attention_tangent"] = capsule(JaxGluonAttentionTangent);
        handlers["jax_gluon.quantize"] = capsule(JaxGluonQuantize);
        return handlers;
      },
      "Custom-call targets and their XLA FFI handlers.");
  module.def(
      "offers",
      [](const std::string& device, const std::string& direction,
         const std::map<std::string, int64_t>& numbers,
         const std::map<std::string, std::string>& names) {
        py::list offers;
        for (const auto& offer : jax_gluon::find_offers(device, direction, {numbers, names})) {
          py::dict sizes;
          const auto add = [&](const char* name, const jax_gluon::SizeRange& size) {
            if (size.max != 0) {
              sizes[name] = py::make_tuple(size.preferred, size.min, size.max, size.step);
            }
          };
          add("block_k", offer.block_k);
          add("subtile", offer.subtile);
          add("stages", offer.stages);
          offers.append(py::make_tuple(jax_gluon::name_of(offer.kernel), offer.arithmetic,
                                       reason_for(offer), sizes));
        }
        return offers;
      },
      py::arg("device"), py::arg("direction"), py::arg("numbers"), py::arg("names"),
      "The kernels that a device has for a problem: name, arithmetic, what it is for, and the "
      "sizes that it takes as (preferred, least, most, step).");
  module.def(
      "max_visible_keys",
      [](const std::map<std::string, int64_t>& numbers,
         const std::map<std::string, std::string>& names) {
        return jax_gluon::max_visible_keys(jax_gluon::KernelQuery{numbers, names});
      },
      py::arg("numbers"), py::arg("names"), "The most keys that any row of a problem can see.");
  module.def(
      "kernel_runs",
      [](bool reset) {
        py::list runs;
        for (const auto& run : jax_gluon::kept_runs(reset)) {
          py::dict found;
          found["pass"] = run.pass;
          found["device"] = run.device;
          found["kernel"] = jax_gluon::name_of(run.kernel);
          found["arithmetic"] = run.arithmetic;
          found["variant"] = run.variant;
          found["block_k"] = run.block_k;
          found["subtile"] = run.subtile;
          found["stages"] = run.stages;
          runs.append(found);
        }
        return runs;
      },
      py::arg("reset"), "The kernels of the last attention calls, oldest first.");
  module.attr("KERNEL_NAMES") = py::tuple(py::cast(
      std::vector<std::string>(jax_gluon::kKernelNames.begin(), jax_gluon::kKernelNames.end())));
  module.attr("FFI_API") =
      std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
  module.attr("METAL_MAX_HEAD_DIM") = jax_gluon::kMaxHeadDimOfMetal;
  module.attr("METAL_MAX_QUANTIZED_HEAD_DIM") = jax_gluon::kMaxQuantizedHeadDimOfMetal;
  module.def("cpu_isa", &jax_gluon::cpu_isa,
             "Instruction-set variant that the CPU kernels run in.");
  module.def("cpu_isas_supported", &jax_gluon::cpu_isas_supported,
             "Variants that are compiled in and that this processor runs, best first.");
  module.def(
      "cpu_scratch_state",
      [] {
        const auto [kept_bytes, made_blocks] = jax_gluon::cpu_scratch_state();
        return py::make_tuple(kept_bytes, made_blocks);
      },
      "Bytes of scratch memory that are kept for later calls, and blocks that were made so far.");
  module.def("cpu_isa_refusal", &jax_gluon::cpu_isa_refusal,
             "Why the operating system refuses a variant that there is, or an empty string.");
  module.def(
      "metal_device",
      [] {
        std::string why;
        const bool is_there = jax_gluon::metal_device(&why) != nullptr;
        return py::make_tuple(is_there ? jax_gluon::metal_device_name() : "", why);
      },
      "Name of the Metal device, or an empty string and why there is none.");
  module.def("metal_family", &jax_gluon::metal_device_family,
             "The newest family of Apple's GPUs that the Metal device belongs to.");
  module.def("metal_by_default", &jax_gluon::metal_by_default,
             "Whether calls that may run on either device may go to Metal.");
  module.attr("METAL_MIN_PRODUCTS") = jax_gluon::kMinProductsForMetal;
  module.def("prefers_metal", &jax_gluon::prefers_metal, py::arg("products"), py::arg("widest"),
             py::arg("min_products"),
             "Whether a call that may run on either device is for Metal: `min_products` is what "
             "was measured, or -1.");
  module.def("tests_metal", &jax_gluon::tests_metal,
             "Whether the Metal device is tested before it is used.");
  module.def(
      "metal_self_test",
      [](bool again) {
        jax_gluon::MetalVerdict verdict;
        {
          const py::gil_scoped_release released;
          verdict = jax_gluon::metal_verdict(again);
        }
        py::dict found;
        found["passed"] = verdict.passed;
        found["why"] = verdict.why;
        found["remembered"] = verdict.remembered;
        found["file"] = verdict.file;
        return found;
      },
      py::arg("again"),
      "Whether the Metal device computes what the CPU does: run once in a process, or remembered.");
  module.def(
      "metal_pin",
      [](uintptr_t address, size_t bytes) {
        std::string why;
        // Python's name for an array's memory is an integer.
        // NOLINTNEXTLINE(performance-no-int-to-ptr)
        const auto* memory = reinterpret_cast<const void*>(address);
        const int64_t pin = jax_gluon::metal_pin(memory, bytes, &why);
        return py::make_tuple(pin, why);
      },
      py::arg("address"), py::arg("bytes"),
      "Number of the pin that keeps memory as a buffer of Metal's, or 0 and why there is none.");
  module.def("metal_unpin", &jax_gluon::metal_unpin, py::arg("pin"), "Lets a pin go.");
  module.def("metal_pin_uses", &jax_gluon::metal_pin_uses, py::arg("pin"),
             "How many operands of calls were read from a pin.");
  module.def("metal_counters", &jax_gluon::metal_counters, py::arg("reset"),
             "Work of the software Metal device, as JSON.");
}
