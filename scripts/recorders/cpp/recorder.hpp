// Writer of recordings for C++17, without libraries: a header to be copied (MIT, the minidiff authors).
//
//     Recorder recording("mine.safetensors", R"({"program": "my port", "dtype": "float32"})");
//     recording.add("step.0/unet/conv_in", {2, 8, 4, 8}, y.data());   // in the order of computation
//     recording.close();
//
// The file is eight bytes of length, a JSON header and the values, as minidiff/parity/SPECIFICATION.md describes it. It
// appears under its name when it is closed.
#pragma once
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

class Recorder {
    std::string path, run, stages, table, data;

    static std::string quoted(const std::string& text) {
        std::string found = "\"";
        for (unsigned char c : text) {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, c < 32 || c == '"' || c == '\\' ? "\\u%04x" : "%c", c);
            found += escaped;
        }
        return found + "\"";
    }

public:
    // `run`: a JSON object that describes the run; "layout": "NHWC" is said there.
    Recorder(std::string path, std::string run) : path(std::move(path)), run(std::move(run)) {}

    void add(const std::string& stage, const std::vector<int64_t>& shape, const float* values) {
        int64_t count = 1;
        std::string sides;
        for (int64_t side : shape) {
            count *= side;
            sides += (sides.empty() ? "" : ",") + std::to_string(side);
        }
        const size_t begin = data.size();
        data.append(reinterpret_cast<const char*>(values), count * sizeof(float));  // on a little-endian machine
        stages += (stages.empty() ? "" : ",") + quoted(stage);
        table += "," + quoted(stage) + R"(:{"dtype":"F32","shape":[)" + sides + R"(],"data_offsets":[)" +
                 std::to_string(begin) + "," + std::to_string(data.size()) + "]}";
    }

    void close() {
        std::string header = R"({"__metadata__":{"recording.version":"2","recording.stages":)" +
                             quoted("[" + stages + "]") + R"(,"recording.run":)" + quoted(run) + "}" + table + "}";
        header.resize((8 + header.size() + 63) / 64 * 64 - 8, ' ');
        const std::string part = path + ".part";
        std::ofstream file(part, std::ios::binary);
        for (int k = 0; k < 8; ++k) file.put(static_cast<char>(static_cast<uint64_t>(header.size()) >> (8 * k)));
        file << header << data;
        file.close();
        if (!file || std::rename(part.c_str(), path.c_str()) != 0) throw std::runtime_error(path + ": cannot be written");
    }
};
