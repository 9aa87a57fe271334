// The first ResBlock of Stable Diffusion's UNet, written out, as an example of a port that is held against a recording.
//
//     resblock WEIGHTS RECORDING OUT
//
// WEIGHTS: a UNet in diffusers' layout, in float32. RECORDING: a run of it, from which the block's inputs are read. OUT:
// what is computed here, layer by layer, for `minidiff parity compare RECORDING OUT`.
#include <cmath>
#include <cstring>
#include <iostream>
#include <regex>
#include <sstream>

#include "recorder.hpp"

using Floats = std::vector<float>;
struct Tensor { std::vector<int64_t> shape; Floats values; };
const int64_t GROUPS = 4;  // of the tiny model; 32 in published ones

// The tensor `name` of a safetensors file.
Tensor load(const std::string& path, const std::string& name) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream content;
    content << file.rdbuf();
    const std::string bytes = content.str();
    uint64_t length = 0;
    if (bytes.size() < 8 || (std::memcpy(&length, bytes.data(), 8), length > bytes.size() - 8))
        throw std::runtime_error(path + ": no safetensors file");
    const std::string header = bytes.substr(8, length);
    const size_t at = header.find("\"" + name + "\":{");
    std::smatch found;
    const std::string entry = at == std::string::npos ? "" : header.substr(at + name.size() + 3, 200);
    const std::regex form(R"re(^\{"dtype":"F32","shape":\[([\d, ]*)\],"data_offsets":\[(\d+), ?(\d+)\])re");
    if (!std::regex_search(entry, found, form)) throw std::runtime_error(path + ": no float32 tensor " + name);
    Tensor tensor;
    std::istringstream sides(found[1].str());
    for (std::string side; std::getline(sides, side, ',');) tensor.shape.push_back(std::stoll(side));
    const uint64_t begin = std::stoull(found[2]), end = std::stoull(found[3]);
    if (begin > end || end > bytes.size() - 8 - length) throw std::runtime_error(path + ": shorter than its header says");
    tensor.values.resize((end - begin) / sizeof(float));
    std::memcpy(tensor.values.data(), bytes.data() + 8 + length + begin, tensor.values.size() * sizeof(float));
    return tensor;
}

void silu(Tensor& x) {
    for (float& value : x.values) value /= 1 + std::exp(-value);
}

// x: (B, C, H, W). Sums are in double: the answer is then the exact one, rounded once.
Tensor group_norm(Tensor x, const Tensor& weight, const Tensor& bias) {
    const int64_t channels = x.shape[1], plane = x.shape[2] * x.shape[3], size = channels / GROUPS * plane;
    for (int64_t group = 0; group < x.shape[0] * GROUPS; ++group) {
        float* values = &x.values[group * size];
        double sum = 0, squares = 0;
        for (int64_t k = 0; k < size; ++k) sum += values[k];
        const double mean = sum / size;
        for (int64_t k = 0; k < size; ++k) squares += (values[k] - mean) * (values[k] - mean);
        const double scale = 1 / std::sqrt(squares / size + 1e-5);
        for (int64_t k = 0; k < size; ++k) {
            const int64_t channel = (group * size + k) / plane % channels;
            values[k] = static_cast<float>((values[k] - mean) * scale * weight.values[channel] + bias.values[channel]);
        }
    }
    return x;
}

// A 3 x 3 convolution of x: (B, C, H, W), padded by one.
Tensor convolution(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    const int64_t out = weight.shape[0], in = weight.shape[1], h = x.shape[2], w = x.shape[3];
    Tensor y{{x.shape[0], out, h, w}, Floats(x.shape[0] * out * h * w)};
    for (int64_t at = 0; at < static_cast<int64_t>(y.values.size()); ++at) {
        const int64_t column = at % w, row = at / w % h, o = at / (w * h) % out, b = at / (w * h * out);
        double sum = bias.values[o];
        for (int64_t tap = 0; tap < in * 9; ++tap) {
            const int64_t i = tap / 9, r = row + tap / 3 % 3 - 1, c = column + tap % 3 - 1;
            if (r >= 0 && r < h && c >= 0 && c < w)
                sum += static_cast<double>(weight.values[o * in * 9 + tap]) * x.values[((b * in + i) * h + r) * w + c];
        }
        y.values[at] = static_cast<float>(sum);
    }
    return y;
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    const int64_t out = weight.shape[0], in = weight.shape[1];
    Tensor y{{x.shape[0], out}, Floats(x.shape[0] * out)};
    for (int64_t at = 0; at < x.shape[0] * out; ++at) {
        double sum = bias.values[at % out];
        for (int64_t k = 0; k < in; ++k)
            sum += static_cast<double>(weight.values[at % out * in + k]) * x.values[at / out * in + k];
        y.values[at] = static_cast<float>(sum);
    }
    return y;
}

void run(const std::string& weights, const std::string& recorded, const std::string& out) {
    Recorder recording(out, R"({"program": "resblock.cpp", "dtype": "float32"})");
    const auto layer = [&](const char* name, auto&& compute, const Tensor& x) {
        const std::string key = std::string("down_blocks.0.resnets.0.") + name;
        return compute(x, load(weights, key + ".weight"), load(weights, key + ".bias"));
    };
    const auto show = [&](const std::string& name, const Tensor& x) {
        recording.add("step.0/unet/down.0.res.0" + name, x.shape, x.values.data());
    };
    const Tensor x = load(recorded, "step.0/unet/conv_in");
    Tensor embedding = load(recorded, "step.0/unet/time");

    Tensor y = layer("norm1", group_norm, x);
    show(".norm1", y);
    silu(y);
    y = layer("conv1", convolution, y);
    show(".conv1", y);
    silu(embedding);
    const Tensor time = layer("time_emb_proj", linear, embedding);
    show(".time", time);
    const int64_t plane = y.shape[2] * y.shape[3];
    for (size_t k = 0; k < y.values.size(); ++k) y.values[k] += time.values[k / plane];
    y = layer("norm2", group_norm, y);
    show(".norm2", y);
    silu(y);
    y = layer("conv2", convolution, y);
    show(".conv2", y);
    for (size_t k = 0; k < y.values.size(); ++k) y.values[k] += x.values[k];
    show("", y);
    recording.close();
}

int main(int count, char** arguments) {
    if (count != 4) return std::cerr << "usage: resblock WEIGHTS RECORDING OUT\n", 2;
    try {
        run(arguments[1], arguments[2], arguments[3]);
    } catch (const std::exception& error) {
        return std::cerr << error.what() << "\n", 2;
    }
}
