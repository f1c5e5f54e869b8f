// The all-to-all with several ranks: each is a device of its own in a thread, and all see each other's memory.
#include "ep_cases.h"

#include <thread>

#include "cases.h"

namespace xt::test {
namespace {

// Memory of a group, all of it poisoned but the signal pages.
class DeviceRanks {
 public:
  // `element`: what rows consist of, at most.
  DeviceRanks(int world, int64_t data_bytes, DType element = DType::f32, double timeout_s = 10) {
    all_.world = world;
    all_.timeout_s = timeout_s;
    all_.index_bytes = 1024;
    all_.data_bytes = data_bytes;
    for (int r = 0; r < world; ++r) {
      memory_.emplace_back(static_cast<size_t>(signal_bytes + all_.block_bytes()) / sizeof(Line) + 1);
      char* p = reinterpret_cast<char*>(memory_.back().data());
      std::memset(p + signal_bytes, 0xff, static_cast<size_t>(all_.block_bytes()));
      all_.signal[r] = p;
      all_.block[r] = p + signal_bytes;
      device_.in_out("signals", Tensor(p, DType::i32, {signal_bytes / 4}));
      device_.in_out("block", Tensor(p + signal_bytes, element, {all_.block_bytes() / size_of(element)}));
    }
  }
  Peers peers(int rank) const {
    Peers p = all_;
    p.rank = rank;
    return p;
  }
  // body(rank) on every rank at once; what the first that threw has to say.
  std::string run(const std::function<void(int)>& body) const {
    std::vector<std::string> errors(all_.world);
    std::vector<std::thread> threads;
    for (int r = 0; r < all_.world; ++r) {
      threads.emplace_back([&, r] {
        try {
          body(r);
        } catch (const std::runtime_error& e) {
          errors[r] = e.what();
        }
      });
    }
    for (std::thread& t : threads) t.join();
    for (const std::string& e : errors) {
      if (!e.empty()) return e;
    }
    return "";
  }

 private:
  struct alignas(64) Line {
    char bytes[64] = {};
  };
  Peers all_;
  std::vector<std::vector<Line>> memory_;
  OnMachine device_;
};

// In the block of a rank, which the machine knows already.
Tensor shared(Tensor t) {
  t.device = {DeviceType::cuda, 1};
  return t;
}

// The maps of one rank, from the device.
struct DeviceRoute : OwnedRoute {
  uint64_t fault = no_fault;

  DeviceRoute(const RankLoad& load, const Peers& peers, int64_t spare_rows = 0, int64_t capacity = -1)
      : OwnedRoute(load, peers.world) {
    std::vector<int32_t> work(ep_prepare_workspace_size(tokens * k, experts, DeviceType::cuda), -7);
    OnMachine d;
    const Tensor workspace = d.out("workspace", view(work, {static_cast<int64_t>(work.size())}));
    ep_prepare(d.in("topk_idx", view(load.topk_idx, {tokens, k})), capacity, peers, d.out("counts", route().counts),
               d.out("dest", route().dest), d.out("offsets", view(offsets, {experts / world + 1})), d.stream(), &workspace);
    rows = offsets.back() + spare_rows;
    fault = d.fault();
  }

  EpRoute on(OnMachine& d) const { return {d.in("counts", route().counts), d.in("dest", route().dest)}; }
};

StepResult device_step(const RankLoad& load, const Peers& peers, int64_t spare_rows) {
  const int64_t t = load.tokens(), k = load.k, h = load.hidden(), first_expert = load.experts / peers.world * peers.rank;
  const DType dtype = load.x.view().dtype;
  const DeviceRoute maps(load, peers, spare_rows);
  require(maps.fault == no_fault, describe_fault(maps.fault));
  Array rows(dtype, {maps.rows, h}), out(dtype, {t, h}), dx(dtype, {t, h});
  StepResult result;
  result.dprobs.assign(t * k, NAN);
  DataArea area(peers);
  const Tensor y = area.rows(rows), dy = area.rows(rows);
  const auto experts = [&](const Tensor& at) {
    copy(at, rows.view());
    for (int64_t i = maps.offsets.back() * h; i < rows.count(); ++i) require(rows[i] == 0, "unused element ", i, " is not zero");
    multiply_rows(rows, maps.offsets, first_expert);
    copy(rows.view(), at);
  };
  uint64_t fault = no_fault;
  const auto on_device = [&](const std::function<void(OnMachine&, const EpRoute&)>& body) {
    OnMachine d;
    body(d, maps.on(d));
    fault = std::min(fault, d.fault());
  };
  on_device([&](OnMachine& d, const EpRoute& r) {
    ep_dispatch(d.in("x", load.x.view()), nullptr, r, peers, shared(y), nullptr, d.stream());
  });
  experts(y);
  on_device([&](OnMachine& d, const EpRoute& r) {
    const Tensor probs = d.in("probs", view(load.probs, {t, k}));
    ep_combine(shared(y), r, peers, &probs, d.out("out", out.view()), d.stream());
  });
  on_device([&](OnMachine& d, const EpRoute& r) {
    ep_combine_bwd(d.in("dout", load.dout.view()), shared(y), r, peers, d.in("probs", view(load.probs, {t, k})), shared(dy),
                   d.out("dprobs", view(result.dprobs, {t, k})), d.stream());
  });
  experts(dy);
  on_device([&](OnMachine& d, const EpRoute& r) {
    ep_combine(shared(dy), r, peers, nullptr, d.out("dx", dx.view()), d.stream());
  });
  require(fault == no_fault, describe_fault(fault));
  result.out = out.bytes();
  result.dx = dx.bytes();
  return result;
}

void require_same_step(const StepResult& got, const RankLoad& load) {
  const StepResult cpu = local_step(load);
  if (cpu_fuses()) {
    require_same(got.out, cpu.out, "out");
    require_same(got.dx, cpu.dx, "dx");
  }
  for (size_t i = 0; i < cpu.dprobs.size(); ++i) {  // sums of H products in another order
    const double size = 8e-6 * static_cast<double>(load.hidden()) * 16;
    require(std::fabs(got.dprobs[i] - cpu.dprobs[i]) <= size, "dprobs[", i, "] is ", got.dprobs[i], ", on the CPU ", cpu.dprobs[i]);
  }
}

}  // namespace

void ep_case(Rng& rng, int world, DType dtype, int64_t hidden, int steps) {
  constexpr int64_t data_bytes = 1 << 17;
  const DeviceRanks ranks(world, data_bytes, dtype);
  for (int step = 0; step < steps; ++step) {
    std::vector<RankLoad> loads;
    int64_t choices;
    do {
      loads = random_loads(rng, world, dtype, hidden);
      choices = 0;
      for (const RankLoad& load : loads) choices += load.tokens() * load.k;
    } while ((choices + 8) * hidden * size_of(dtype) > data_bytes / 2 - 64);
    std::vector<StepResult> results(world);
    const std::string error = ranks.run([&](int r) { results[r] = device_step(loads[r], ranks.peers(r), r % 3); });
    require(error.empty(), error);
    for (int r = 0; r < world; ++r) require_same_step(results[r], loads[r]);
  }
}

namespace {

TEST(CudaEp, SameBitsAsOneRankWithAllExperts) {
  Rng rng(1);
  for_each_schedule([&] {
    for (int world : {1, 2, 4}) ep_case(rng, world, rng() % 2 ? DType::f32 : DType::bf16, pick(rng, {1, 17, 130}), 2);
  });
  ep_case(rng, 3, DType::bf16, 128, 3);
  ep_case(rng, 2, DType::f32, 1028, 1);  // more than one tile a row
}

// The maps are the CPU's, number by number.
TEST(CudaEp, RoutesAsTheCpuDoes) {
  Rng rng(2);
  for (int trial = 0; trial < 6; ++trial) {
    for (int world : {1, 2, 4}) {
      const auto loads = random_loads(rng, world, DType::f32, 4);
      const DeviceRanks device(world, 4096), host(world, 4096);
      const int64_t capacity = trial % 2 ? -1 : static_cast<int64_t>(rng() % 60);
      const std::string error = device.run([&](int r) {
        const DeviceRoute got(loads[r], device.peers(r), 0, capacity);
        const OwnedRoute cpu(loads[r], host.peers(r), 0, 1, capacity);
        require(got.fault == no_fault, describe_fault(got.fault));
        require_same(got.counts, cpu.counts, "counts");
        require_same(got.dest, cpu.dest, "dest");
        require_same(got.offsets, cpu.offsets, "offsets");
      });
      EXPECT_EQ(error, "") << "world " << world;
    }
  }
}

TEST(CudaEp, QuantizedRowsBringTheirScales) {
  Rng rng(3);
  for (int world : {1, 2, 3}) {
    const auto loads = random_loads(rng, world, DType::f32, 4);
    const DeviceRanks device(world, 1 << 17, DType::e4m3), host(world, 1 << 17);
    const std::string error = device.run([&](int r) {
      const int64_t t = loads[r].tokens(), ld = t + 2;
      Rng own(r);
      const Array scales = Array(DType::f32, {3, ld}).randomise(own);
      Array q(DType::e4m3, {t, 18});
      for (int64_t i = 0; i < q.count(); ++i) q.view().ptr<uint8_t>()[i] = static_cast<uint8_t>(own());
      const DeviceRoute maps(loads[r], device.peers(r), 2, 2000);
      const OwnedRoute cpu_maps(loads[r], host.peers(r), 2, 1, 2000);
      Array rows(DType::e4m3, {maps.rows, 18}), row_scales(DType::f32, {3, maps.rows + 1}), cpu = rows, cpu_scales = row_scales;
      DataArea area(device.peers(r)), cpu_area(host.peers(r));
      const Tensor out = area.rows(rows), out_scales = shared(area.rows(row_scales));
      const Tensor cpu_out = cpu_area.rows(rows), cpu_out_scales = cpu_area.rows(row_scales), host_scales = scales.view();
      OnMachine d;
      const Tensor s = d.in("scales", scales.view());
      ep_dispatch(d.in("q", q.view()), &s, maps.on(d), device.peers(r), shared(out), &out_scales, d.stream());
      ep_dispatch(q.view(), &host_scales, cpu_maps.route(), host.peers(r), cpu_out, &cpu_out_scales, {});
      copy(out, rows.view()), copy(out_scales, row_scales.view());
      copy(cpu_out, cpu.view()), copy(cpu_out_scales, cpu_scales.view());
      require(d.fault() == no_fault, describe_fault(d.fault()));
      require(rows.bytes() == cpu.bytes(), "codes differ from the CPU's");
      require(row_scales.bytes() == cpu_scales.bytes(), "scales differ from the CPU's");
    });
    EXPECT_EQ(error, "") << "world " << world;
  }
}

uint64_t dispatch_fault(const RankLoad& load, const Peers& peers, const DeviceRoute& maps) {
  DataArea area(peers);
  const Array rows(DType::f32, {maps.rows, load.hidden()});
  OnMachine d;
  ep_dispatch(d.in("x", load.x.view()), nullptr, maps.on(d), peers, shared(area.rows(rows)), nullptr, d.stream());
  return d.fault();
}

TEST(CudaEp, AMissingRankIsNotedWithinTheBound) {
  const std::vector<RankLoad> loads(2, {4, 1, {0, 3, 3}, {1, 1, 1}, Array(DType::f32, {3, 4}), Array(DType::f32, {3, 4})});
  const DeviceRanks ranks(2, 4096, DType::f32, 0.2);
  std::vector<uint64_t> faults(2, no_fault);
  std::vector<std::unique_ptr<DeviceRoute>> maps(2);
  EXPECT_EQ(ranks.run([&](int r) { maps[r] = std::make_unique<DeviceRoute>(loads[r], ranks.peers(r)); }), "");
  EXPECT_EQ(ranks.run([&](int r) { if (r == 0) faults[0] = dispatch_fault(loads[0], ranks.peers(0), *maps[0]); }), "");
  EXPECT_EQ(faults[0], fault_word(Fault::ep_timeout, ep_fault_index(2, 1, 2)));
  EXPECT_EQ(describe_fault(faults[0]), "ep_dispatch: exchange 2: rank 1 did not come within the group's timeout_s");
  EXPECT_EQ(ranks.run([&](int r) { if (r == 1) faults[1] = DeviceRoute(loads[1], ranks.peers(1)).fault; }), "");
  EXPECT_EQ(describe_fault(faults[1]), "ep_prepare: exchange 2: rank 0 was in another op: all ranks must call the same ops in the same order");
  EXPECT_EQ(ranks.run([&](int r) { dispatch_fault(loads[r], ranks.peers(r), *maps[r]); }), "");  // both have given up: no waiting
}

TEST(CudaEp, NotesRowsThatTheirRankDoesNotHave) {
  const std::vector<RankLoad> loads(2, {2, 1, {1, 1, 0}, {1, 1, 1}, Array(DType::f32, {3, 4}), Array(DType::f32, {3, 4})});
  const DeviceRanks ranks(2, 4096);
  std::vector<uint64_t> faults(2);
  EXPECT_EQ(ranks.run([&](int r) {
    DeviceRoute maps(loads[r], ranks.peers(r));
    if (r == 0) maps.dest[3] = 4;  // rank 1 has rows 0 to 3
    if (r == 1) maps.dest[0] = 2;
    faults[r] = dispatch_fault(loads[r], ranks.peers(r), maps);
  }), "");
  EXPECT_EQ(faults[0], fault_word(Fault::ep_dest, 1));
  EXPECT_EQ(faults[1], fault_word(Fault::ep_dest, 0));
}

TEST(CudaEp, RefusesOddAreas) {
  const RankLoad load = {2, 1, {0}, {1}, Array(DType::f32, {1, 4}), Array(DType::f32, {1, 4})};
  const DeviceRanks ranks(1, 4096);
  Peers odd = ranks.peers(0);
  odd.index_bytes = 1000;
  expect_error([&] { DeviceRoute(load, odd); }, "ep_prepare: on a GPU, blocks of peers must start at multiples of 16 bytes");
}

}  // namespace
}  // namespace xt::test
