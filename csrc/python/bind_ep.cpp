// Expert parallelism: the memory that ranks share, and the ops that exchange rows through it.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bind.h"
#include "tensor_caster.h"
#include "xtuner/ops/ep_combine.h"
#include "xtuner/ops/ep_dispatch.h"
#include "xtuner/shared_memory.h"

namespace xt::python {
namespace {

// A piece of shared memory as a Python buffer; torch.frombuffer keeps it alive for as long as its tensor lives.
class Piece {
 public:
  Piece(std::shared_ptr<SharedMemory> memory, int64_t bytes)
      : memory_(std::move(memory)), at_(memory_->allocate(bytes)), bytes_(bytes) {}
  ~Piece() { memory_->free(at_); }
  Piece(const Piece&) = delete;
  Piece& operator=(const Piece&) = delete;

  py::buffer_info buffer() const { return py::buffer_info(static_cast<uint8_t*>(at_), bytes_); }

 private:
  std::shared_ptr<SharedMemory> memory_;
  void* at_;
  int64_t bytes_;
};

std::shared_ptr<SharedMemory> make_memory(int rank, int world, int64_t data_bytes, double timeout_s,
                                          const py::function& all_gather) {
  return std::make_shared<SharedMemory>(rank, world, data_bytes, timeout_s, [&](const std::string& mine) {
    return all_gather(py::bytes(mine)).cast<std::vector<std::string>>();
  });
}

bool owns(const SharedMemory& memory, py::handle tensor) {
  const Arg t("owns", "tensor", tensor);
  const int64_t bytes = (*t).numel() * size_of((*t).dtype);
  return bytes == 0 || memory.peers().owns((*t).data, bytes);
}

// Peers whose memory somebody else made. Each rank's is one piece: its signal page, two index areas, its data area.
Peers make_peers(int rank, const std::vector<uint64_t>& memory, int64_t index_bytes, int64_t data_bytes, double timeout_s) {
  const int world = static_cast<int>(memory.size());
  if (world < 1 || world > max_peers) fail("Peers: world must be in [1, ", max_peers, "], got ", world);
  if (rank < 0 || rank >= world) fail("Peers: rank must be in [0, world=", world, "), got ", rank);
  if (!(timeout_s > 0)) fail("Peers: timeout_s must be positive, got ", timeout_s);
  Peers peers;
  peers.rank = rank;
  peers.world = world;
  peers.timeout_s = timeout_s;
  peers.index_bytes = index_bytes;
  peers.data_bytes = data_bytes;
  for (int r = 0; r < world; ++r) {
    peers.signal[r] = reinterpret_cast<void*>(memory[r]);
    peers.block[r] = static_cast<char*>(peers.signal[r]) + signal_bytes;
  }
  return peers;
}

void ep_prepare(py::handle topk_idx, std::optional<int64_t> capacity, const Peers& peers, py::handle counts,
                py::handle dest, py::handle offsets, int num_threads, py::handle workspace) {
  const char* op = "ep_prepare";
  if (capacity && *capacity < 0) fail(op, ": capacity must not be negative, got ", *capacity);
  Arg i(op, "topk_idx", topk_idx), c(op, "counts", counts), d(op, "dest", dest), o(op, "offsets", offsets);
  OptionalArg w(op, "workspace", workspace);
  py::gil_scoped_release nogil;
  xt::ep_prepare(*i, capacity.value_or(-1), peers, *c, *d, *o, stream_of(i, num_threads), w.get());
}

int64_t ep_prepare_workspace_size(py::handle topk_idx, int64_t num_experts) {
  const Arg i("ep_prepare_workspace_size", "topk_idx", topk_idx);
  return xt::ep_prepare_workspace_size((*i).numel(), num_experts, (*i).device.type);
}

void ep_dispatch(py::handle x, py::handle scales, py::handle counts, py::handle dest, const Peers& peers,
                 py::handle out, py::handle out_scales, int num_threads) {
  const char* op = "ep_dispatch";
  Arg a(op, "x", x), c(op, "counts", counts), d(op, "dest", dest), o(op, "out", out);
  OptionalArg s(op, "scales", scales), os(op, "out_scales", out_scales);
  py::gil_scoped_release nogil;
  xt::ep_dispatch(*a, s.get(), {*c, *d}, peers, *o, os.get(), stream_of(a, num_threads));
}

void ep_combine(py::handle y, py::handle counts, py::handle dest, const Peers& peers, py::handle probs,
                py::handle out, int num_threads) {
  const char* op = "ep_combine";
  Arg a(op, "y", y), c(op, "counts", counts), d(op, "dest", dest), o(op, "out", out);
  OptionalArg p(op, "probs", probs);
  py::gil_scoped_release nogil;
  xt::ep_combine(*a, {*c, *d}, peers, p.get(), *o, stream_of(a, num_threads));
}

void ep_combine_bwd(py::handle dout, py::handle y, py::handle counts, py::handle dest, const Peers& peers,
                    py::handle probs, py::handle dy, py::handle dprobs, int num_threads) {
  const char* op = "ep_combine_bwd";
  Arg g(op, "dout", dout), a(op, "y", y), c(op, "counts", counts), d(op, "dest", dest), p(op, "probs", probs),
      dr(op, "dy", dy), dp(op, "dprobs", dprobs);
  py::gil_scoped_release nogil;
  xt::ep_combine_bwd(*g, *a, {*c, *d}, peers, *p, *dr, *dp, stream_of(g, num_threads));
}

}  // namespace

void bind_ep(py::module_& m) {
  using namespace py::literals;
  m.attr("signal_bytes") = signal_bytes;
  py::class_<Peers>(m, "Peers")
      .def(py::init(&make_peers), "rank"_a, "memory"_a, "index_bytes"_a, "data_bytes"_a, "timeout_s"_a);
  py::class_<SharedMemory, std::shared_ptr<SharedMemory>>(m, "SharedMemory")
      .def(py::init(&make_memory), "rank"_a, "world"_a, "data_bytes"_a, "timeout_s"_a, "all_gather"_a)
      .def_property_readonly("allocated", &SharedMemory::allocated)
      .def_property_readonly("reached", &SharedMemory::reached)
      .def_property_readonly("peers", &SharedMemory::peers)
      .def("owns", &owns, "tensor"_a);
  py::class_<Piece>(m, "SharedPiece", py::buffer_protocol())
      .def(py::init<std::shared_ptr<SharedMemory>, int64_t>(), "memory"_a, "num_bytes"_a)
      .def_buffer(&Piece::buffer);
  m.def("ep_prepare", &ep_prepare, "topk_idx"_a, "capacity"_a, "peers"_a, "counts"_a, "dest"_a, "offsets"_a,
        "num_threads"_a, "workspace"_a = py::none());
  m.def("ep_prepare_workspace_size", &ep_prepare_workspace_size, "topk_idx"_a, "num_experts"_a);
  m.def("ep_dispatch", &ep_dispatch, "x"_a, "scales"_a, "counts"_a, "dest"_a, "peers"_a, "out"_a, "out_scales"_a,
        "num_threads"_a);
  m.def("ep_combine", &ep_combine, "y"_a, "counts"_a, "dest"_a, "peers"_a, "probs"_a, "out"_a, "num_threads"_a);
  m.def("ep_combine_bwd", &ep_combine_bwd, "dout"_a, "y"_a, "counts"_a, "dest"_a, "peers"_a, "probs"_a, "dy"_a,
        "dprobs"_a, "num_threads"_a);
}

}  // namespace xt::python
